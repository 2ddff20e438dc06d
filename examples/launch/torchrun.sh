#!/bin/bash
# A run on several machines by torchrun. Start this on each of them, with NODE=0 on the first, NODE=1 on the next ...:
#
#     NODE=0 NODES=2 HEAD=first-machine bash examples/launch/torchrun.sh examples/real_dpo.yaml --model_name M \
#         --train_file_path D --output_dir /shared/out --deepspeed examples/launch/zero3.json
#
# HEAD is a name or address of the first machine that all know; ADDRESS one of this machine that the others know, where
# its own name is not known to them. PROCESSES is the number of processes a machine: one a GPU where it is not set.
# SCRIPT=score.py runs score.py.
#
# Exit code 75: the run was told to stop, or the network was cut; the same command goes on. 2: wrong input.
# torchrun by itself reports both as 1, and where the network is cut it may wait a quarter of an hour for an answer. So
# each process leaves its exit code in a file (the first to fail counts), and torchrun gets 40 seconds to end after it.
#
# After SIGTERM a process has 100 seconds to save; then torchrun kills it. TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets another
# number of seconds. Whoever sends SIGTERM, and SIGKILL after it, must wait longer than that. torchrun reads the
# variable from torch 2.12 on. That of torch 2.11 kills after 30 seconds, and would refuse the flag --shutdown-timeout.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
failed=$(mktemp -d)/code
# A signal reaches the process itself, too. Bash, between it and torchrun, waits until it has ended.
process='trap : TERM INT; "${@:2}"; code=$?; set -o noclobber; ((code)) && echo "$code" 2>/dev/null >"$1"; exit "$code"'

"${TORCHRUN:-.venv/bin/torchrun}" --nnodes "$NODES" --nproc_per_node "${PROCESSES:-gpu}" --rdzv_backend c10d \
    --rdzv_id "${RUN:-nanodpo}" --rdzv_endpoint "$HEAD:${PORT:-29400}" --rdzv_conf "is_host=$((NODE == 0))" \
    ${ADDRESS:+--local_addr "$ADDRESS"} \
    --no_python bash -c "$process" process "$failed" "${PYTHON:-.venv/bin/python}" "${SCRIPT:-train.py}" "$@" &
torchrun=$!
trap 'kill -TERM $torchrun' TERM INT
left=${PATIENCE:-40}
while kill -0 $torchrun 2>/dev/null && ((left > 0)); do
    sleep 1 &
    wait $! # ends at once when a signal comes; a plain sleep would hold it back
    [ -s "$failed" ] && ((left -= 1))
done
kill -KILL $torchrun 2>/dev/null
wait $torchrun
code=$?
[ -s "$failed" ] && code=$(<"$failed")
rm -r "$(dirname "$failed")"
exit "$code"
