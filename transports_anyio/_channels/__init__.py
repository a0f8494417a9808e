"""Channels: the I/O half under a transport, a module for each way that bytes move.

May know: the poller, AnyIO, the operating system. Knows nothing of transports: it calls what `open` was given.
"""
