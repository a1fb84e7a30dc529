#!/usr/bin/env bash
# GRPO with LoRA, resumed from a checkpoint, in a colocated vLLM engine with LoRA layers.
#   MODEL, DATASET   as ms-swift takes them
#   CHECKPOINT       the checkpoint-N to go on from
#   REWARD           the reward function (default: accuracy)
#   EXTRA_PLUGINS    your own plugins, separated by spaces
# Look for "engine and trainer agree" in the log. Afterwards: swift-lora-fix report output
set -eu
# shellcheck disable=SC2086  # EXTRA_PLUGINS is several words on purpose
exec swift rlhf \
    --rlhf_type grpo \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --reward_funcs "${REWARD:-accuracy}" \
    --resume_from_checkpoint "$CHECKPOINT" \
    --lora_rank 16 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_enable_lora true \
    --vllm_gpu_memory_utilization 0.4 \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-5 \
    --logging_steps 1 \
    --output_dir output \
    --external_plugins "$(swift-lora-fix plugin)" ${EXTRA_PLUGINS:-} \
    "$@"
