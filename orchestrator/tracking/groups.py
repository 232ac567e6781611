"""What waits in the outbox, put together so that it takes few calls: points of one run that were told one by one."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.tracking.messages import Message, Points


def groups(messages: Sequence[Message]) -> list[list[int]]:
    """Places of messages that go in one call, each group where its first one stands.

    Points of a run go with those before them unless something else of that run came between: of each run everything
    stays in order. Whatever stands before a group's first message is in earlier groups.
    """
    out: list[list[int]] = []
    open_: dict[str, list[int]] = {}
    for place, message in enumerate(messages):
        if isinstance(message, Points) and message.run in open_:
            open_[message.run].append(place)
            continue
        out.append([place])
        if isinstance(message, Points):
            open_[message.run] = out[-1]
        else:
            open_.pop(message.run, None)
    return out
