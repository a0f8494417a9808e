"""Transports: the state machines that protocols see.

May know: channels and protocols. No module here imports `socket`.
"""
