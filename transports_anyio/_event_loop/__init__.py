"""asyncio's event loop, built on the core of a group and its endpoint functions. Groups do not know it."""
