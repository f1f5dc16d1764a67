"""What was done to a model, what it gains and how it went, for people: `explain`, `profile` and the report of a run.

- `explain`: a row per layer; `graphs`: the graph before and after each pass, which `drawing` draws.
- `profile`: gated against dense, timed; `products` are what it times one by one, `clock` times, `limits` are what the
  machine can do at most.
- `run` reads a run's log, `report` makes a page of it, `tensorboard` an event file.
- `undisturbed` runs a model and leaves it as it was; `tables` is how all of it is shown.
"""

from ctrlcompile.inspect.explain import Explanation, explain
from ctrlcompile.inspect.profile import Profile, profile

__all__ = ["Explanation", "Profile", "explain", "profile"]
