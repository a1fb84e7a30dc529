#!/usr/bin/env bash
# GRPO with two rollout servers on this host: GPUs 0 and 1 generate, GPU 2 trains. The servers end with the trainer.
#   MODEL, DATASET   as ms-swift takes them
#   REWARD           the reward function (default: accuracy)
#   EXTRA_PLUGINS    your own plugins, separated by spaces; the servers get them too (multi-turn schedulers)
#   SERVER_ARGUMENTS more arguments for the servers (default: none); those of this script are the trainer's
#   PORT             of the first server, the second has the next one (default: 8000)
# The plugin goes to both sides. Without NCCL between them: export SWIFT_LORA_FIX_TRANSPORT=reload
set -eu
port=${PORT:-8000}
plugin=$(swift-lora-fix plugin)
servers=()
# shellcheck disable=SC2086  # EXTRA_PLUGINS and SERVER_ARGUMENTS are several words on purpose
trap '[ ${#servers[@]} -eq 0 ] || kill "${servers[@]}" 2>/dev/null || true' EXIT
for gpu in 0 1; do
    CUDA_VISIBLE_DEVICES=$gpu swift rollout \
        --model "$MODEL" \
        --port $((port + gpu)) \
        --vllm_enable_lora true \
        --vllm_max_lora_rank 16 \
        --external_plugins "$plugin" ${EXTRA_PLUGINS:-} \
        ${SERVER_ARGUMENTS:-} \
        >"server-$gpu.log" 2>&1 &
    servers+=($!)
done
CUDA_VISIBLE_DEVICES=2 swift rlhf \
    --rlhf_type grpo \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --reward_funcs "${REWARD:-accuracy}" \
    --lora_rank 16 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host 127.0.0.1 127.0.0.1 \
    --vllm_server_port "$port" "$((port + 1))" \
    --vllm_server_timeout 600 \
    --vllm_enable_lora true \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-5 \
    --logging_steps 1 \
    --output_dir output \
    --external_plugins "$plugin" ${EXTRA_PLUGINS:-} \
    "$@"
