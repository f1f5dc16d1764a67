"""What was done to a model, and what it gains, for people: `explain` and `profile`.

- `explain`: a row per linear; `graphs`: the graph before and after each pass.
- `profile`: gated against dense, timed; `products` are what it times one by one, `clock` times, `limits` are what the
  machine can do at most.
- `undisturbed` runs a model and leaves it as it was; `tables` is how all of it is shown.
"""

from ctrlcompile.inspect.explain import Explanation, explain
from ctrlcompile.inspect.profile import Profile, profile

__all__ = ["Explanation", "Profile", "explain", "profile"]
