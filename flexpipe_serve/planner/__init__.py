"""When and how to change the pipeline: pure functions over plain data. No Ray, torch, clock or socket in here."""
