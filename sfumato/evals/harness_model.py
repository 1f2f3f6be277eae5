"""The model that lm-evaluation-harness sees. Importing this imports that package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

if TYPE_CHECKING:
    from sfumato.evals.harness_requests import HarnessRequests


def harness_model(requests: HarnessRequests) -> Any:
    """The model that carries these requests out."""
    return HarnessModel(requests)


class HarnessModel(LM):  # type: ignore[misc]  # the package has no types
    """lm-eval's interface of a model. Each request has `args`: two texts, a text and wishes, or one text."""

    def __init__(self, requests: HarnessRequests) -> None:
        super().__init__()
        self.requests = requests

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """See `HarnessRequests.likelihoods`."""
        return self.requests.likelihoods([one.args for one in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """See `HarnessRequests.text_likelihoods`."""
        return self.requests.text_likelihoods([one.args[0] for one in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """See `HarnessRequests.texts`."""
        return self.requests.texts([one.args for one in requests])
