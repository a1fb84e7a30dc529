#!/usr/bin/env bash
# GRPO with a 4-bit base in the trainer (QLoRA). The engine serves the base in bf16 and the adapter in its LoRA layers.
#   MODEL, DATASET   as ms-swift takes them
#   REWARD           the reward function (default: accuracy)
#   EXTRA_PLUGINS    your own plugins, separated by spaces
# Fused mode cannot be had here: quantised weights cannot be rewritten, and the start of the run would say so.
set -eu
# shellcheck disable=SC2086  # EXTRA_PLUGINS is several words on purpose
exec swift rlhf \
    --rlhf_type grpo \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --reward_funcs "${REWARD:-accuracy}" \
    --quant_method bnb \
    --quant_bits 4 \
    --bnb_4bit_quant_type nf4 \
    --bnb_4bit_compute_dtype bfloat16 \
    --lora_rank 16 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_enable_lora true \
    --vllm_gpu_memory_utilization 0.4 \
    --sleep_level 1 \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-5 \
    --logging_steps 1 \
    --output_dir output \
    --external_plugins "$(swift-lora-fix plugin)" ${EXTRA_PLUGINS:-} \
    "$@"
