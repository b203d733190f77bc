"""A look at a model's layers between their making and the loading of weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.model_executor.model_loader.base_loader import BaseModelLoader


@contextmanager
def looked_at_once_built(look: Callable[[], None]) -> Iterator[None]:
    """Let `look` see the layers of the first model that vLLM makes inside, before their weights.

    What a layer cannot do is seen in the layer, and weights may take minutes. vLLM has no hook
    there; its loaders share one method that makes a model. A draft model is made after the target,
    and its layers are marked as its own later still.
    """
    create: Any = BaseModelLoader.create_model
    has_looked = False

    @wraps(create)
    def create_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal has_looked
        model = create(self, *args, **kwargs)
        if not has_looked:
            has_looked = True
            look()
        return model

    BaseModelLoader.create_model = create_and_look  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseModelLoader.create_model = create  # type: ignore[method-assign]
