"""Engine of a served model: asks its server for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models.engine import Engine, EngineRecords, LogitReducer, RemoteEngine
from analysis.served.listed_tokens import ListedTokens, TokenList
from analysis.served.server import ModelServer
from defenses.errors import UserError

MAX_CONCURRENT_CALLS = 8
Reply = TypeVar("Reply")


class WeightsNeededError(UserError):
    """Something was asked of a served model that only weights can tell."""


class ServedEngine(RemoteEngine):
    """Computes what `Engine` computes by asking a server.

    Where the server lists all tokens, logits are log-probabilities, so that every readout is exact. Else
    `read_first_token` gives the unlisted tokens equal shares of the probability that is left, which serves to
    make readouts; margins are bounded instead, from `iterate_listed_tokens`.

    Args:
        server: of the model, whose abilities are known.
        n_vocabulary: number of token ids.
    """

    responses_per_batch: ClassVar[int] = 16

    def __init__(self, server: ModelServer, n_vocabulary: int) -> None:
        self.server, self.n_vocabulary = server, n_vocabulary
        self._records = EngineRecords()

    @property
    def lists_all(self) -> bool:
        """Whether the server lists all tokens."""
        return self.server.abilities.lists_all

    def iterate_first_token(
        self, prompts: Sequence[Sequence[int]], reducer: LogitReducer
    ) -> Iterator[tuple[list[int], Float[Tensor, "rows values"]]]:
        """Yield the index and the reduced log-probabilities of the first token of each prompt."""
        n_tokens = self.server.abilities.n_listed
        for row, tokens in self._iterate_replies(
            prompts, lambda row: self.server.list_tokens(prompts[row], n_tokens)
        ):
            listed = self._make_listed(tokens)
            yield [row], reducer(listed.log_probabilities if self.lists_all else listed.complete())

    def iterate_listed_tokens(
        self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int], with_most_probable: bool
    ) -> Iterator[tuple[int, ListedTokens]]:
        """Yield the index of each prompt, and what the server lists of its first token.

        Args:
            prompts: as for `read_first_token`.
            token_ids: tokens whose log-probabilities are asked for, where the server takes ids.
            with_most_probable: whether to ask for the most probable tokens even so.
        """
        takes_ids, n_listed = self.server.abilities.takes_ids, self.server.abilities.n_listed

        def ask_server(row: int) -> TokenList:
            tokens = self.server.read_tokens(prompts[row], token_ids) if takes_ids else TokenList({})
            if n_listed and (with_most_probable or not takes_ids):
                tokens = tokens.join(self.server.list_tokens(prompts[row], n_listed))
            return tokens

        for row, tokens in self._iterate_replies(prompts, ask_server):
            yield row, self._make_listed(tokens)

    def read_token_logits(
        self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> Float[Tensor, "prompts tokens"]:
        """Return the log-probabilities of some first tokens.

        Raises:
            UserError: if the server does not list one of them.
        """
        ids = list(dict.fromkeys(token_ids))
        if self.lists_all:
            return super().read_token_logits(prompts, token_ids)
        rows = dict(self.iterate_listed_tokens(prompts, ids, with_most_probable=False))
        listed = [rows[row] for row in range(len(prompts))]
        n_missing = sum(not tokens.is_listed[0, ids].all() for tokens in listed)
        if n_missing:
            raise UserError(
                f"the server lists {self.server.abilities.describe()}, and for {n_missing} of {len(prompts)} "
                "prompts these lack tokens that are needed: start it so that it lists more (vLLM: "
                "--max-logprobs)"
            )
        return torch.cat([tokens.log_probabilities[:, list(token_ids)] for tokens in listed])

    def generate_token_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        append_token: Callable[[list[int], int], bool],
        on_progress: Callable[[int], None],
    ) -> list[list[int]]:
        """Return the greedy response to each prompt as token ids, without the end token."""
        responses: dict[int, list[int]] = {}
        for row, token_ids in self._iterate_replies(
            prompts, lambda row: self.server.generate(prompts[row], max_new_tokens)
        ):
            responses[row] = []
            for token_id in token_ids:
                if append_token(responses[row], token_id):
                    break
            on_progress(1)
        return [responses[row] for row in range(len(prompts))]

    def compute_log_probabilities(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] = lambda rows: None,
    ) -> list[Float[Tensor, " tokens"]]:
        """Raise: servers tell the log-probabilities of given texts in no common way."""
        raise WeightsNeededError(
            "the log-likelihood of given texts needs a model with weights on this machine"
        )

    def iterate_logits(
        self, prompts: Sequence[Sequence[int]], n_positions: Sequence[int], share_prefix: bool = True
    ) -> Iterator[tuple[list[int], Float[Tensor, "ends vocab"]]]:
        """Raise: a server runs no hooks."""
        raise WeightsNeededError("hidden states need a model with weights on this machine")

    def split_rows(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Engine, list[int]]]:
        """Return this engine with all prompts."""
        return [(self, list(range(len(prompts))))]

    @property
    def has_changed_form(self) -> bool:
        """Whether the form of the batches was changed: a server has its own."""
        return False

    def _make_listed(self, tokens: TokenList) -> ListedTokens:
        try:
            return ListedTokens.from_lists([tokens], self.n_vocabulary)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"--model at {self.server.address.host}: the server's log-probabilities cannot be used "
                f"({error}): it has to tell those of the model itself (vLLM: --logprobs-mode raw_logprobs), "
                "and to use the tokenizer of the run"
            ) from error

    def _iterate_replies(
        self, prompts: Sequence[Sequence[int]], call: Callable[[int], Reply]
    ) -> Iterator[tuple[int, Reply]]:
        """Yield row and reply of each call as they come; after a failure, first those under way."""
        if not prompts or not all(map(len, prompts)):
            raise ValueError("no prompts to read, or an empty one")
        pool = ThreadPoolExecutor(MAX_CONCURRENT_CALLS)
        rows: dict[Future[Reply], int] = {pool.submit(call, row): row for row in range(len(prompts))}
        failure: BaseException | None = None
        try:
            waiting = as_completed(rows)
            while True:
                try:
                    future = next(waiting)
                except StopIteration:
                    break
                except KeyboardInterrupt as interruption:
                    failure = interruption
                    waiting = as_completed(_cancel_calls(rows))
                    continue
                if future.cancelled():
                    continue
                if error := future.exception():
                    failure = failure or error
                    waiting = as_completed(_cancel_calls(rows))
                    continue
                row = rows.pop(future)
                self.work_counter.computed_tokens += len(prompts[row])
                yield row, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure


def _cancel_calls(rows: dict[Future[Reply], int]) -> list[Future[Reply]]:
    """Cancel the calls that have not begun; return the others that may still succeed."""
    return [
        future
        for future in list(rows)
        if not future.cancel() and not (future.done() and future.exception() is not None)
    ]
