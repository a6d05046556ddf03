"""The scheduler, planner, gate and allocator of the server, over simulated stages and time."""
