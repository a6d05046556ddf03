"""How property tests run: no deadline for one example (the machine may be busy), and half of hypothesis' examples, for
there are many such tests. ``--hypothesis-profile=soak`` tries a hundred times as many."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=50)
settings.register_profile("soak", deadline=None, max_examples=5000)
settings.load_profile("suite")
