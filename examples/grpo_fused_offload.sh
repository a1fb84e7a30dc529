#!/usr/bin/env bash
# GRPO in fused mode: the engine's weights are the base with the adapter folded in, so it generates as fast as the plain
# base. While it does, the trainer's model and optimizer are on the host; while the trainer works, the engine sleeps.
#   MODEL, DATASET   as ms-swift takes them
#   REWARD           the reward function (default: accuracy)
#   EXTRA_PLUGINS    your own plugins, separated by spaces
# Watch lora_sync/lost_share: the share of the update that bf16 rounds away. Above 0.5 there is a warning.
set -eu
# shellcheck disable=SC2086  # EXTRA_PLUGINS is several words on purpose
exec swift rlhf \
    --rlhf_type grpo \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --reward_funcs "${REWARD:-accuracy}" \
    --lora_rank 16 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_enable_lora false \
    --vllm_gpu_memory_utilization 0.7 \
    --sleep_level 1 \
    --move_model_batches 10 \
    --offload_model true \
    --offload_optimizer true \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-5 \
    --logging_steps 1 \
    --output_dir output \
    --external_plugins "$(swift-lora-fix plugin)" ${EXTRA_PLUGINS:-} \
    "$@"
