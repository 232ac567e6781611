"""Names that people know from Trainer, TRL, peft, W&B, Ray, Optuna and LLaMA-Factory, each with the form to write here.

A table only: `right_forms` answers with it. A name that exists here at another place of the file needs no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BATCH = "training.pairs_per_update"
SETTINGS: Mapping[str, str] = {
    **dict.fromkeys(("lr", "learning-rate", "peak_lr", "max_lr"), "training.learning_rate"),
    **dict.fromkeys(("batch_size", "train_batch_size", "global_batch_size", "effective_batch_size"), _BATCH),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "training.num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_train_steps"), "training.max_steps"),
    **dict.fromkeys(("scheduler_type", "lr_scheduler", "lr_schedule"), "training.lr_scheduler_type"),
    **dict.fromkeys(("warmup", "warmup_proportion"), "training.warmup_ratio"),
    **dict.fromkeys(("clip_grad", "max_norm", "gradient_clipping"), "training.max_grad_norm"),
    **dict.fromkeys(("seed", "random_seed", "data_seed"), "training.seed"),
    **dict.fromkeys(("beta1", "adam_b1"), "training.adam_beta1"),
    **dict.fromkeys(("beta2", "adam_b2"), "training.adam_beta2"),
    **dict.fromkeys(("eps", "adam_eps"), "training.adam_epsilon"),
    **dict.fromkeys(("activation_checkpointing", "grad_checkpointing"), "training.gradient_checkpointing"),
    "wd": "training.weight_decay",
    "log_interval": "training.logging_steps",
    "eval_interval": "training.eval_steps",
    "save_interval": "training.save_steps",
    "pref_beta": "loss.beta",
    "dpo_beta": "loss.beta",
    "simpo_beta": "loss.beta",
    "simpo_gamma": "loss.gamma",
    "pref_loss": "loss.loss_type",
    "dpo_label_smoothing": "loss.label_smoothing",
    "label_smoothing_factor": "loss.label_smoothing",
    "pref_ftx": "loss.nll_scale",
    "cpo_alpha": "loss.nll_scale",
    "rpo_alpha": "loss.nll_scale",
    "dpo_ftx": "loss.nll_scale",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    **dict.fromkeys(("model_name_or_path", "base_model", "base_model_name_or_path", "model_name"), "model"),
    "model_revision": "model.revision",
    "tokenizer_name": "model.tokenizer",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention",
    "quantization_bit": "model.load_in_4bit",
    **dict.fromkeys(("train_file", "train_dataset", "dataset_dir", "train_path"), "data.train"),
    **dict.fromkeys(("eval_file", "eval_dataset", "validation_file", "test_dataset"), "data.eval"),
    "val_size": "data.eval_share",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_samples": "data.max_train_rows",
    "chat_template_path": "data.chat_template",
    "num_samples": "budget.trials",
    "n_trials": "budget.trials",
    "run_cap": "budget.trials",
    "count": "budget.trials",
    "max_trials": "budget.trials",
    "n_jobs": "budget.concurrency",
    "max_concurrent": "budget.concurrency",
    "max_concurrent_trials": "budget.concurrency",
    "experiment_name": "tracking.experiment",
    "project": "tracking.experiment",
    "project_name": "tracking.experiment",
    "mlflow_tracking_uri": "tracking.uri",
    "tracking_uri": "tracking.uri",
    "run_name": "name",
    "study_name": "name",
    "sweep_name": "name",
    "points_to_evaluate": "enqueue",
    "resources_per_trial": "resources.gpus_per_trial",
    "num_gpus": "resources.gpus_per_trial",
    "num_cpus": "resources.cpus_per_trial",
}
"""Another tool's name -> the setting or key of the file."""

SENTENCES: Mapping[str, str] = {
    name: sentence
    for names, sentence in (
        (
            "output_dir logging_dir local_dir storage_path overwrite_output_dir",
            "files go under $ORCHESTRATE_HOME, by default ./runs; nothing is overwritten; remove it",
        ),
        (
            "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size gradient_accumulation_steps",
            "write base: {training: {pairs_per_update: N}}: N is per_device_train_batch_size times "
            "gradient_accumulation_steps times the GPUs; micro-batches fill tokens_per_micro_batch",
        ),
        (
            "auto_find_batch_size per_device_eval_batch_size eval_batch_size eval_accumulation_steps "
            "batch_eval_metrics torch_empty_cache_steps",
            "micro-batches are sized by training.tokens_per_micro_batch and halved where memory runs out; remove it",
        ),
        ("warmup_steps", "write base: {training: {warmup_ratio: R}}: R is warmup_steps divided by the updates"),
        (
            "eval_strategy evaluation_strategy do_eval eval_on_start eval_delay prediction_loss_only "
            "eval_do_concat_batches eval_use_gather_object",
            "the held-out pairs are evaluated at the start, the end and every training.eval_steps updates",
        ),
        (
            "save_strategy save_only_model save_on_each_node restore_callback_states_from_checkpoint "
            "enable_jit_checkpoint checkpoint_config",
            "a checkpoint is written every training.save_steps updates and always holds what resuming needs; remove it",
        ),
        (
            "save_total_limit",
            "a trial's older checkpoints are removed by themselves; write keep_models: N for the final weights of the"
            " N best trials",
        ),
        (
            "logging_strategy logging_first_step logging_nan_inf_filter",
            "metrics are logged every training.logging_steps updates",
        ),
        (
            "log_level log_level_replica log_on_each_node disable_tqdm verbose debug log_to_file progress_reporter "
            "show_progress_bar plot_loss",
            "`orchestrate status NAME` and `orchestrate report NAME` show the sweep; remove it",
        ),
        ("report_to logger callbacks", "tracking goes to MLflow: tracking: {uri: ..., experiment: ...}; remove it"),
        (
            "load_best_model_at_end metric_for_best_model greater_is_better",
            "write maximize: METRIC or minimize: METRIC; the best trial's model is kept, and `orchestrate best NAME "
            "--export FOLDER` exports it",
        ),
        (
            "resume_from_checkpoint ignore_data_skip load_if_exists resume",
            "`orchestrate resume NAME` continues a sweep from its checkpoints; remove it",
        ),
        (
            "do_train do_predict stage",
            "every trial trains on preference pairs; write base: {loss: {kind: dpo}} or another loss, and sft: "
            "{training: {...}} for supervised fine-tuning before; remove it",
        ),
        (
            "optim optim_args optim_target_modules optimizer",
            "AdamW is the only optimizer: training.learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon;"
            " remove it",
        ),
        (
            "lr_scheduler_kwargs",
            "write training.lr_scheduler_type: cosine, linear, constant or constant_with_warmup, and "
            "training.warmup_ratio",
        ),
        (
            "fp16 fp16_full_eval half_precision mixed_precision",
            "write base: {training: {bf16: true}}; 16-bit floats without bfloat16's range are not offered",
        ),
        (
            "bf16_full_eval tf32 pure_bf16",
            "write base: {training: {bf16: true}} for autocast, base: {model: {dtype: bfloat16}} for weights in "
            "bfloat16",
        ),
        ("load_in_8bit", "write base: {model: {load_in_4bit: true}, lora: {}}: 4 bits with adapters"),
        (
            "bnb_4bit_quant_type bnb_4bit_quant_storage bnb_4bit_compute_dtype use_bnb_nested_quant "
            "quantization_config quantization_method quantization_type double_quantization",
            "model.load_in_4bit uses NF4; its variants are not offered; remove it",
        ),
        (
            "deepspeed fsdp fsdp_config accelerator_config parallelism_config ddp_backend ddp_broadcast_buffers "
            "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout local_rank zero_stage",
            "write base: {training: {distributed: fsdp2}} and resources: {gpus_per_trial: N} for a trial on N GPUs",
        ),
        ("use_cpu no_cuda", "write resources: {gpus_per_trial: 0}"),
        (
            "gradient_checkpointing_kwargs activation_checkpointing_kwargs activation_offloading",
            "write base: {training: {gradient_checkpointing: true}}",
        ),
        (
            "torch_compile torch_compile_backend torch_compile_mode",
            "write base: {model: {compile: true}}",
        ),
        (
            "use_liger_kernel liger_kernel_config use_kernels",
            "write base: {model: {kernels: liger}}; auto uses it on a GPU where it is installed",
        ),
        (
            "rope_scaling use_unsloth shift_attn resize_vocab upcast_layernorm use_galore use_badam "
            "use_fast_tokenizer neftune_noise_alpha router_aux_loss_coef ignore_bias_buffers",
            "is not offered; remove it",
        ),
        ("full_determinism", "a trial is reproducible by training.seed; remove it"),
        (
            "group_by_length length_column_name train_sampling_strategy packing neat_packing packing_strategy "
            "eval_packing padding_free pad_to_multiple_of padding_value pad_token padding_side",
            "pairs are packed without padding, in an order that training.seed decides; remove it",
        ),
        (
            "average_tokens_across_devices include_num_input_tokens_seen include_for_metrics label_names "
            "remove_unused_columns skip_memory_metrics is_encoder_decoder use_cache",
            "has no counterpart here; remove it",
        ),
        (
            "dataset_num_proc preprocessing_num_workers overwrite_cache preprocessing_batch_size shuffle_dataset "
            "dataset_streaming streaming dataset_kwargs dataset_text_field",
            "rows are tokenized once and cached by content; remove it",
        ),
        (
            "dataset_name dataset_config dataset_train_split dataset_test_split train_split eval_split dataset",
            "write base: {data: {train: {dataset: NAME, split: train}, eval: {dataset: NAME, split: test}}}, with "
            "subset: for a configuration; a file is train: FILE",
        ),
        (
            "adapter_name_or_path ref_model_adapters ref_model_quantization_bit",
            "merge the adapter into its model first: base: {model: FOLDER} is the merged model; remove it",
        ),
        ("cache_dir tokenized_path", "the hub's cache is $HF_HOME, tokenized data lie in the runs folder; remove it"),
        (
            "dataset_mixer interleave_probs mix_strategy",
            "write base: {data: {train: [{path: A, weight: 2}, {path: B, weight: 1}]}}",
        ),
        ("template", "the model's own chat template is used; another is base: {data: {chat_template: FILE}}"),
        (
            "finetuning_type use_peft peft_config peft adapter",
            "write base: {lora: {}} for adapters, and leave lora out for all weights",
        ),
        (
            "use_rslora use_dora use_qalora use_bdlora init_lora_weights bias task_type lora_task_type "
            "modules_to_save lora_modules_to_save target_parameters lora_target_parameters lora_bias fan_in_fan_out "
            "layers_pattern layers_to_transform rank_pattern alpha_pattern exclude_modules additional_target "
            "loraplus_lr_ratio layer_replication loftq_config corda_config eva_config lora_ga_config velora_config "
            "monteclora_config kasa_config arrow_config runtime_config megatron_config megatron_core "
            "ensure_weight_tying inference_mode peft_type peft_version auto_mapping alora_invocation_tokens "
            "trainable_token_indices qalora_group_size create_new_adapter",
            "adapters have r, alpha, dropout and target_modules; remove it",
        ),
        ("trust_remote_code", "is never taken from a file; give the option --trust-remote-code"),
        ("model_init_kwargs", "write base: {model: {dtype: ..., attention: ..., revision: ...}}"),
        (
            "reference_free ref_model ref_model_name_or_path precompute_ref_log_probs precompute_ref_batch_size",
            "the reference is the initial model, its log-probs are computed once and cached (TR-DPO moves it: "
            "loss.sync_ref_model); remove it",
        ),
        ("disable_dropout", "dropout is off unless lora.dropout is set; remove it"),
        ("generate_during_eval", "write base: {evaluation: {prompts: 4}}: greedy completions of held-out prompts"),
        (
            "truncation_mode max_completion_length max_response_length max_target_length",
            "write base: {data: {max_length: N}} for prompt and response together, and max_prompt_length; prompts "
            "lose their oldest tokens",
        ),
        (
            "completion_only_loss assistant_only_loss train_on_prompt mask_history eos_token",
            "only response tokens are scored (data.score: all or last); remove it",
        ),
        (
            "method search_alg search_algorithm algorithm tuner",
            "write sampler: grid, random, qmc, tpe, gp, cmaes, nsgaii or staged",
        ),
        (
            "parameters param_space search_space config hyperparameters space params hparams",
            "write search: {PATH: [values]} or {PATH: {log_uniform: [low, high]}}, and what all trials share under "
            "base",
        ),
        ("goal", "write maximize: METRIC or minimize: METRIC, such as maximize: eval_accuracies/logp"),
        (
            "metric direction directions mode objective objectives",
            "write maximize: METRIC or minimize: METRIC, such as maximize: eval_accuracies/logp",
        ),
        (
            "early_terminate early_stopping scheduler",
            "write pruner: hyperband, successive_halving, median or another; the learning rate's schedule is "
            "training.lr_scheduler_type",
        ),
        ("program command entity function func trainable", "trials are trained by this program; remove it"),
        ("time_budget_s timeout max_time", "write budget: {hours: H}"),
        ("stop", "write budget: {target: VALUE} to end the sweep at a value, training.max_steps for a trial's length"),
        ("failure_config max_failures max_retries catch", "lost workers are retried by themselves; remove it"),
        ("seeds num_seeds n_seeds", "write repeats: 3 for three seeds of each configuration"),
        (
            "reuse_actors sync_config gc_after_trial chdir_to_trial_dir storage_filesystem trial_name_creator "
            "trial_dirname_creator parallelism",
            "is decided by this program; remove it",
        ),
        ("env environment env_vars", "environment variables come from the shell; remove it"),
    )
    for name in names.split()
}
"""Another tool's name -> what to write here, where it is no single setting."""

FAMILIES: Mapping[str, str] = {
    "dataloader_": "rows are tokenized once and read from memory-mapped files; remove it",
    "hub_": "`orchestrate best NAME --export FOLDER` writes the model; upload it from there; remove it",
    "push_to_hub": "`orchestrate best NAME --export FOLDER` writes the model; upload it from there; remove it",
    "trackio_": "tracking goes to MLflow: tracking: {uri: ..., experiment: ...}; remove it",
    "wandb": "tracking goes to MLflow: tracking: {uri: ..., experiment: ...}; remove it",
}
"""Beginning of other tools' names -> what to write here."""

METHODS: Mapping[str, str] = {
    **dict.fromkeys(("bayes", "bayesian", "bayesopt", "bohb", "hyperopt", "optuna", "tpesampler"), "tpe"),
    **dict.fromkeys(("gpsampler", "gaussian_process", "ax", "botorch", "skopt"), "gp"),
    **dict.fromkeys(("gridsampler", "grid_search", "bruteforcesampler", "brute_force"), "grid"),
    **dict.fromkeys(("randomsampler", "random_search", "basicvariantgenerator", "variant_generator"), "random"),
    **dict.fromkeys(("qmcsampler", "sobol", "halton"), "qmc"),
    **dict.fromkeys(("cmaessampler", "cma", "cma-es", "cma_es", "nevergrad"), "cmaes"),
    **dict.fromkeys(("nsgaiisampler", "nsgaiiisampler", "nsga2", "nsga", "nsga-ii", "genetic"), "nsgaii"),
    **dict.fromkeys(("asha", "ashascheduler", "sha", "successivehalvingpruner"), "successive_halving"),
    **dict.fromkeys(
        ("hyperbandscheduler", "asynchyperbandscheduler", "async_hyperband", "asynchyperband"), "hyperband"
    ),
    **dict.fromkeys(("hyperbandpruner", "hyperbandforbohb", "hb_bohb"), "hyperband"),
    **dict.fromkeys(("medianpruner", "medianstoppingrule", "median_stopping_rule", "median_stopping"), "median"),
    **dict.fromkeys(("noppruner", "fifo", "fifoscheduler", "nop", "off", "no"), "none"),
    "percentilepruner": "percentile",
    "thresholdpruner": "threshold",
    "wilcoxonpruner": "wilcoxon",
    "patientpruner": "patient",
}
"""Another tool's name of a method, in lower case -> the kind of sampler or pruner here."""

LOSS_NAMES: Mapping[str, str] = {
    "alphapo": "{kind: simpo, alpha: A}",
    "rpo": "{kind: dpo, nll_scale: 1.0}",
    "wpo": "{kind: dpo, use_weighting: true}",
    "ld-dpo": "{kind: dpo, ld_alpha: 0.5}",
    "ld_dpo": "{kind: dpo, ld_alpha: 0.5}",
    **dict.fromkeys(("dpo-positive", "dpo_positive", "dpopositive"), "{kind: dpo, loss_type: dpop}"),
    **dict.fromkeys(("chi-po", "chi_po", "chi2po", "chi2-po"), "{kind: dpo, loss_type: chipo}"),
    "slic": "{kind: dpo, loss_type: hinge}",
    "sppo": "{kind: dpo, loss_type: sppo_hard}",
    "apo": "{kind: dpo, loss_type: apo_zero}",
    **dict.fromkeys(("r-dpo", "r_dpo", "length_dpo", "lendpo"), "{kind: dpo, length_alpha: 0.01}"),
    **dict.fromkeys(("odpo", "dpo-offset", "dpo_offset"), "{kind: dpo, odpo_alpha: 1.0}"),
    **dict.fromkeys(("tr-dpo", "tr_dpo", "trdpo"), "{kind: dpo, sync_ref_model: true}"),
    "exo": "{kind: dpo, loss_type: exo_pair, label_smoothing: 0.001}",
    "nca": "{kind: dpo, loss_type: nca_pair}",
    "bco": "{kind: dpo, loss_type: bco_pair}",
}
"""A paper's name -> the loss section that is this loss."""

VALUES: Mapping[str, Mapping[str, Any]] = {
    "model.dtype": {
        **dict.fromkeys(("bf16", "torch.bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp32", "torch.float32", "float", "full"), "float32"),
    },
    "model.attention": dict.fromkeys(
        ("flash_attention_2", "flash_attention_3", "flash_attention", "fa2", "sdpa", "eager", "flex_attention"), "auto"
    ),
    "training.distributed": dict.fromkeys(("fsdp", "fsdp1", "deepspeed", "zero2", "full_shard"), "fsdp2"),
    "training.lr_scheduler_type": {
        "cosine_with_restarts": "cosine",
        "cosine_with_min_lr": "cosine",
        "constant_with_warm_up": "constant_with_warmup",
        "wsd": "constant_with_warmup",
        "warmup_stable_decay": "constant_with_warmup",
    },
    "lora.target_modules": dict.fromkeys(("all", "all_linear", "all-linears"), "all-linear"),
    "data.bad_rows": {"drop": "skip", "ignore": "skip", "error": "refuse", "raise": "refuse"},
}
"""Setting -> another tool's value of it -> the value here."""

FIRST_KEYS: Mapping[str, Mapping[type, str]] = {
    "budget": {int: "trials", float: "hours"},
    "resources": {int: "gpus_per_trial", float: "gpus_per_trial"},
    "lora": {int: "r"},
    "loss": {str: "kind"},
    "data": {str: "train", tuple: "train"},
    "evaluation": {int: "prompts"},
    "tracking": {str: "uri"},
    "judge": {str: "reward_model", int: "top"},
    "notify": {tuple: "command"},
}
"""Section -> type of a value in its place -> the setting that is meant."""
