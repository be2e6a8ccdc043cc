# shellcheck shell=bash
# Sourced by the job scripts. `run_stage STAGE CONFIG [key=value ...]` starts a stage's ranks on all nodes of this job and
# sees to what follows: nothing more when it is done, the same job again when it was interrupted, else an error.
#
# What it takes from the environment, or from the site file (site.example.sh):
#   STRATEGY        which launch/*.yaml; by default ddp, on one rank single
#   RANKS_PER_NODE  ranks on a node without GPUs (1); a job with GPUs has one rank per GPU
#   SWEEP           with --array: a file whose line N has the further key=value words of task N, a run_dir of its own too
set -euo pipefail
slurm=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$slurm")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-$(if [ -x "$root/.venv/bin/python" ]; then echo "$root/.venv/bin/python"; else echo python; fi)}
# A task of an array by its number there: the bare id of one of them stands for the whole array.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} this_job=${this_job:-${SLURM_JOB_ID:-}}
CONTAINER=() GUARD_FLAGS=()
# shellcheck source=/dev/null
if [ -f "${VQSCALE_SITE:=$slurm/site.sh}" ]; then . "$VQSCALE_SITE"; fi

vqscale() { "${CONTAINER[@]}" "$PYTHON" -m vqscale "$@"; }
say() { echo "[$(date '+%F %T')] $*"; }
about_job() { scontrol show job "$1" --oneliner | sed -n "s/.* $2=\([^ ]*\).*/\1/p"; }

# guard JOB RUN_DIR: the id of the job that looks after JOB should it die without a word; queued if it is not yet.
guard() {
    local id
    id=$(squeue --me --noheader --name="guard-$1" --format=%A)
    if [ -z "$id" ]; then
        id=$(sbatch --parsable --job-name="guard-$1" --dependency="afterany:$1" --kill-on-invalid-dep=yes \
            --output="$2/log/guard-%j.log" "${GUARD_FLAGS[@]}" "$slurm/guard.sh" "$1" "$2")
    fi
    echo "${id%%;*}"
}

# once_more [CHANGE]: this job again, changed as `scontrol update` is told; never after scancel. Does not return.
once_more() {
    if [ "$(about_job "$this_job" JobState)" = CANCELLED ]; then exit 1; fi
    trap '' TERM # comes as soon as the job is requeued
    scontrol requeuehold "$this_job"
    if [ -n "${1:-}" ]; then scontrol update jobid="$this_job" "$1"; fi
    scontrol release "$this_job"
    exit 0
}

# A node that fails the site's HEALTH_CHECK is left out from now on, and the job starts elsewhere.
leave_out_bad_nodes() {
    local bad excluded
    export HEALTH_CHECK
    # shellcheck disable=SC2016 # for the nodes to expand
    bad=$(srun --ntasks-per-node=1 bash -c 'timeout 120 bash -c "$HEALTH_CHECK" >&2 || echo "$SLURMD_NODENAME"' |
        paste -sd,) || true
    if [ -z "$bad" ]; then return; fi
    excluded=$(about_job "$this_job" ExcNodeList)
    say "$bad failed the health check: this job starts again elsewhere"
    once_more ExcNodeList="${bad},${excluded#"(null)"}"
}

# command_of STAGE CONFIG [key=value ...]: `command`, the launcher of one node's ranks; srun fills in which node.
command_of() {
    local ranks_per_node=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}} first address world strategy port
    world=$((SLURM_JOB_NUM_NODES * ranks_per_node))
    strategy=${STRATEGY:-$(if [ $world = 1 ]; then echo single; else echo ddp; fi)}
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
    command=("${CONTAINER[@]}" "$PYTHON" -m accelerate.commands.launch --config_file "$root/launch/$strategy.yaml"
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$world" --machine_rank @NODE@
        --rdzv_backend static --main_process_ip "$address" --main_process_port "$port" -m vqscale "$@")
    say "commit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)," \
        "$("${CONTAINER[@]}" "$PYTHON" -c 'import sys, importlib.metadata as m; print("Python", sys.version.split()[0],
            *(f"{name} {m.version(name)}" for name in ("torch", "accelerate", "deepspeed")))')," \
        "$world ranks on $SLURM_JOB_NODELIST: ${command[*]}"
}

run_stage() {
    local run_dir state progress verdict why log warned="" ranks command
    # shellcheck disable=SC2046 # words
    if [ -n "${SWEEP:-}" ]; then set -- "$@" $(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP"); fi
    trap 'warned=yes' USR1 USR2
    trap ':' TERM # the ranks are told by Slurm itself
    IFS=$'\t' read -r run_dir state progress < <(vqscale status "${@:2}" show=run_dir,state,progress)
    if [ "$state" = "done" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        say "$run_dir is done already"
        exit 0
    fi
    mkdir -p "$run_dir/log"
    echo "$SLURM_JOB_ID" >"$run_dir/log/job"
    guard "$this_job" "$run_dir" >/dev/null || say "no guard: nobody will see it if this job is killed"
    if [ -n "${HEALTH_CHECK:-}" ]; then leave_out_bad_nodes; fi
    command_of "$@"
    if [ -n "$warned" ]; then once_more; fi

    echo "$progress $(date +%s)" >>"$run_dir/log/launches"
    # A warning reaches every process of a node, and the launcher would die of it; the ranks have handlers of their own.
    # shellcheck disable=SC2016 # for the nodes to expand
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 \
        bash -c 'trap "" USR1 USR2; exec "${@/#@NODE@/$SLURM_NODEID}"' node "${command[@]}" &
    ranks=$!
    trap 'warned=yes; say "warned: the ranks save and stop"; kill -USR2 $ranks' USR1 USR2
    while kill -0 $ranks 2>/dev/null; do wait $ranks || true; done

    IFS=$'\t' read -r verdict why log < <(vqscale status "${@:2}" show=verdict,why,log)
    say "$run_dir: $verdict: $why"
    case $verdict in
    done) exit 0 ;;
    again) once_more ;;
    # The program never began: the machine's fault if this was an interruption or if it began before.
    absent) if [ -n "$warned" ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then once_more; fi ;;
    esac
    say "read $log"
    exit 1
}
