"""Load generation and its reports. Talks to servers over HTTP only; imports no torch and no Ray."""
