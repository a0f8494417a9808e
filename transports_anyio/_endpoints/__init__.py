"""Endpoint functions: what makes a connection exist, a module for each family.

May know: transports, channels and the core of a group. Each module is a part of `TransportGroup`.
"""
