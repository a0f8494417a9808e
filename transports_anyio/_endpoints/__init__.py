"""Endpoint functions, which make connections: a module for each family.

Each family is a base class of `TransportGroup`.
"""
