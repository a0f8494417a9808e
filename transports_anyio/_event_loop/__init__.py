"""asyncio's event loop on the transports of this package: what asyncio code needs beside them.

May know: the core and the endpoint functions. A group knows nothing of it.
"""
