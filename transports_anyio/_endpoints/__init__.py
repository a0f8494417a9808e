"""Endpoint functions: what makes a connection exist, a module for each family.

May know: transports and channels. Each module is a part of `TransportGroup`, over what `_base` asks of it.
"""
