#!/bin/bash
# Written by `orchestrate plan --slurm`: one Ray cluster for this job, one driver.
#SBATCH --job-name=llama3-8b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=900G
#SBATCH --time=2-00:00:00
#SBATCH --partition=h100
#SBATCH --account=lab
#SBATCH --constraint=nvlink
#SBATCH --qos=preemptible
#SBATCH --output=llama3-8b-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
umask 077
module load cuda/13.0
export HF_HOME=/shared/hf
export PATH=/shared/venv/bin:"$PATH"
export ORCHESTRATE_HOME=/shared/runs
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# Files of this job on the shared disk: the sweep file, and the token that protects its Ray cluster.
job_folder="$ORCHESTRATE_HOME/.slurm-$SLURM_JOB_ID"
mkdir -p "$job_folder"
export RAY_AUTH_TOKEN_PATH="$job_folder/token"
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
cat > "$job_folder/sweep.yaml" <<'END_OF_SWEEP'
name: llama3-8b
description: SimPO from Llama-3-Base-8B-SFT on UltraFeedback, the paper's grid
base:
  model:
    name_or_path: princeton-nlp/Llama-3-Base-8B-SFT
    generated: null
    revision: null
    tokenizer: null
    dtype: float32
    attention: auto
    load_in_4bit: false
    kernels: auto
    compile: false
  data:
    train:
    - weight: null
      columns: {}
      dataset: HuggingFaceH4/ultrafeedback_binarized
      split: train_prefs
      subset: null
      revision: null
    eval:
    - weight: null
      columns: {}
      dataset: HuggingFaceH4/ultrafeedback_binarized
      split: test_prefs
      subset: null
      revision: null
    eval_share: 0.1
    apply_template: null
    score: all
    max_train_rows: null
    max_eval_rows: null
    max_length: 2048
    max_prompt_length: 1800
    chat_template: null
    bad_rows: skip
    max_bad_share: 0.01
  loss:
    kind: simpo
    loss_type: sigmoid
    beta: 2.0
    gamma: null
    gamma_beta_ratio: null
    label_smoothing: 0.0
    alpha: 0.0
    sft_weight: 0.0
    nll_scale: 0.0
  training:
    learning_rate: 1.0e-06
    pairs_per_update: 128
    tokens_per_micro_batch: auto
    num_train_epochs: 1.0
    max_steps: null
    lr_scheduler_type: cosine
    warmup_ratio: 0.1
    weight_decay: 0.0
    adam_beta1: 0.9
    adam_beta2: 0.999
    adam_epsilon: 1.0e-08
    max_grad_norm: 1.0
    bf16: true
    stochastic_rounding: true
    gradient_checkpointing: auto
    distributed: auto
    seed: 42
    logging_steps: 5
    eval_steps: 50
    save_steps: 400
  lora: null
  evaluation:
    prompts: 4
    answer_steps: null
    samples: 4
    max_new_tokens: 64
  engine: packed
search:
  loss.beta: [2.0, 2.5]
  loss.gamma: [0.3, 0.5, 1.0, 1.2, 1.4, 1.6]
  training.learning_rate: [3.0e-07, 5.0e-07, 6.0e-07, 1.0e-06]
enqueue:
- loss.beta: 2.0
  loss.gamma: 1.0
  training.learning_rate: 6.0e-07
sampler:
  kind: grid
  order: null
  seed: 0
repeats: 1
warm_start: null
order:
  kind: reproducible
  lag: null
maximize: eval_accuracies/logp
require:
  eval_logps_per_token/chosen: '>= initial - 0.7'
  eval_repetition: <= initial + 0.1
  eval_answer_length: <= 2 * initial
  eval_exact_answers: 'off'
pruner:
  broken_evaluations: 3
  kind: median
  metric: null
  n_startup_trials: 5
  n_warmup_steps: 0
  n_min_trials: 1
guard:
  loss:
    ratio: 1.5
    updates: 20
  grad_norm:
    times_median: 20.0
    above: 1000000.0
    updates: 5
    after: 10
  chosen_logps:
    fall: 2.3
    fall_alone: 4.6
    lowest: -10.0
    updates: 5
  repetition:
    rise: 0.5
    looks: 2
  answer_length:
    ratio: 3.0
    looks: 2
budget:
  trials: null
  hours: null
  gpu_hours: null
  target: null
  concurrency: null
resources:
  gpus_per_trial: auto
  cpus_per_trial: 1.0
  processes_per_trial: null
  trials_per_process: auto
tracking:
  uri: null
  experiment: prefsweep
sft: null
keep_models: 1
storage: postgresql+psycopg://me@db/sweeps
END_OF_SWEEP

# The batch script runs on the first machine, which hosts the Ray head and the driver.
first=$(hostname)
address="${PREFSWEEP_HEAD_IP:-$(hostname -I | awk '{print $1}')}:$((20000 + SLURM_JOB_ID % 20000))"
steps=()
srun --nodes=1 --ntasks=1 --cpus-per-task=96 --nodelist="$first" \
  ray start --head --node-ip-address="${address%:*}" --port="${address##*:}" --num-cpus=96 --num-gpus=8 \
  --include-dashboard=false --disable-usage-stats --block &
steps+=($!)
until ray status --address="$address" > "$job_folder/ray-status.txt" 2>&1; do
  kill -0 "${steps[0]}" || { echo "the head of the Ray cluster ended"; exit 1; }
  sleep 2
done
srun --nodes=3 --ntasks=3 --cpus-per-task=96 --exclude="$first" \
  ray start --address="$address" --num-cpus=96 --num-gpus=8 --disable-usage-stats --block &
steps+=($!)

# Start or resume the sweep. USR1: the time limit is near; TERM: preempted or cancelled. In both cases running trials
# are checkpointed. A job that ran out of time is requeued below, a preempted one by Slurm.
orchestrate sweep "$job_folder/sweep.yaml" --continue --address "$address" --machines 4 --trust-remote-code &
driver=$!
requeue=no
trap 'requeue=yes; kill -TERM "$driver"' USR1
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ended the wait, not the driver
  code=0
  wait "$driver" || code=$?
done
trap '' USR1 TERM
kill -TERM "${steps[@]}" 2> /dev/null || echo "part of the Ray cluster had already ended"
wait "${steps[@]}" || echo "the Ray cluster ended"
rm -rf "$job_folder"
if [ "$requeue" = yes ] && [ "$code" -eq 130 ]; then
  echo "out of time: requeueing the job"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
