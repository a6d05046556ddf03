"""Load generation and its reports.

Talks to servers over HTTP only, also to those that it starts itself; imports no torch and no Ray.
"""
