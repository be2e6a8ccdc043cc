#!/usr/bin/env bash
#SBATCH --open-mode=append
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --requeue
# guard.sh JOB RUN_DIR, queued by the job scripts to begin when JOB has ended. A script that ends by itself has seen to its
# run; one that was killed could not, and is queued again here. What waits for a stage of pipeline.sh waits for its guard.
unset SLURM_ARRAY_JOB_ID # of the task that queued this job
# shellcheck source=slurm/common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/.*|\1|p' | head -n 1)/common.sh"
job=$1 run_dir=$2
ending=$(about_job "$job" JobState)/$(about_job "$job" ExitCode)
if [[ $ending = COMPLETED/* ]]; then exit 0; fi

IFS=$'\t' read -r verdict log < <(vqscale status "$run_dir" show=verdict,log)
say "job $job ended as $ending; its run: $verdict"
case $ending/$verdict in
CANCELLED/* | FAILED/*:0/* | */failed) # cancelled by hand, or by a script that knew why
    say "read $log"
    exit 1
    ;;
PENDING/* | RUNNING/* | COMPLETING/*) ;; # it has been queued again
*/done) exit 0 ;;
*) scontrol requeue "$job" ;;
esac
once_more dependency="afterany:$job"
