"""Two processes that each hold slices of one model and generate: this module, run with RANK PORT NUMBER CACHE.

Their answers end at different tokens, as rounding that differs between GPUs can make them. Prints the answers, and what
the model computes afterwards.
"""

import json
import socket
import sys
from pathlib import Path

import torch

from tests.support.small_trials import MODEL, trial
from trainer.config.trial import ModelConfig, TrainingConfig
from trainer.data import prepare
from trainer.distributed.fsdp import reshard
from trainer.distributed.processes import ProcessGroup, join_rendezvous
from trainer.evaluation.completions import generate_token_ids
from trainer.models.model_files import resolve_model_path
from trainer.models.policy_model import PolicyModel, load_model

NEVER = 319
"""The last token of the vocabulary, which this model does not choose."""


def main(rank: int, port: int, number: int, cache: Path) -> None:
    join_rendezvous(rank, 2, port, socket.socket(fileno=number) if rank == 0 else None)
    process_group, config = ProcessGroup(), ModelConfig.model_validate(MODEL)
    policy = PolicyModel(load_model(config, resolve_model_path(config, cache), None), config, "id")
    policy.prepare_for_trial(None, TrainingConfig(), single_use=True)
    policy.shard(process_group.device)
    policy.base.eval()
    pairs = prepare(trial().data, config, cache).eval
    prompts = [pairs.pair(i).prompt.tolist() for i in range(3)]
    free = generate_token_ids(policy.base, prompts, [NEVER], 12)
    reshard(policy.base)
    first = sorted({answer[0] for answer in free})
    # This process's answers end at once, the other's never.
    found = generate_token_ids(policy.base, prompts, first if rank == 0 else [NEVER], 12)
    reshard(policy.base)
    again = generate_token_ids(policy.base, prompts, [NEVER], 12)
    print(json.dumps({"free": free, "found": found, "again": again}))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
