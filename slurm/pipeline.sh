#!/usr/bin/env bash
# slurm/pipeline.sh CONFIGS [sbatch flags]: the whole chain, e.g. slurm/pipeline.sh configs/imagenet256 --partition=gpu
# Every stage waits for those that it reads from. Run again, it submits what is neither done nor in the queue.
FLAGS=()
# shellcheck source=slurm/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
configs=${1:?"slurm/pipeline.sh CONFIGS [sbatch flags]"}
flags=("${@:2}")

declare -A run_dirs states jobs guards
while IFS=$'\t' read -r name run_dir state job; do
    run_dirs[$name]=$run_dir states[$name]=$state jobs[$name]=$job
done < <(vqscale status "$configs" show=name,run_dir,state,job)
if [ ${#states[@]} = 0 ]; then exit 1; fi # status has said why

# submit NAME SCRIPT STAGE [UPSTREAM ...]: the job of configs/NAME.yaml, if there is one, after those upstream.
submit() {
    local name=$1 own="FLAGS_$3[@]" run_dir=${run_dirs[$1]:-} upstream before=""
    if [ -z "$run_dir" ]; then return; fi
    for upstream in "${@:4}"; do before+=${guards[$upstream]:+:${guards[$upstream]}}; done
    case ${states[$name]}$before in
    done)
        echo "$name: done"
        return
        ;;
    queued* | starting* | running*) ;;
    *)
        mkdir -p "$run_dir/log"
        jobs[$name]=$(sbatch --parsable --job-name="$(basename "$configs").$name" --output="$run_dir/log/job-%j.log" \
            ${before:+--dependency="afterok$before"} --kill-on-invalid-dep=yes "${FLAGS[@]}" "${!own}" "${flags[@]}" \
            "${slurm:?}/$2.sh" "$configs/$name.yaml")
        jobs[$name]=${jobs[$name]%%;*}
        echo "${jobs[$name]}" >"$run_dir/log/job"
        ;;
    esac
    guards[$name]=$(guard "${jobs[$name]}" "$run_dir")
    echo "$name: job ${jobs[$name]}, guard ${guards[$name]}: tail -F $run_dir/log/job-${jobs[$name]}.log"
}

submit pack pack pack
submit train_vqvae train_vqvae2 train_vqvae pack
submit extract_codes extract_codes extract_codes train_vqvae
for level in top middle bottom; do submit train_prior_$level train_prior train_prior extract_codes; done
submit train_classifier_real train_classifier train_classifier pack
submit train_classifier_reconstructions train_classifier train_classifier train_vqvae
submit sample sample sample train_prior_top train_prior_middle train_prior_bottom train_classifier_real
submit train_classifier_samples train_classifier train_classifier sample
submit evaluate evaluate evaluate sample train_classifier_real train_classifier_reconstructions train_classifier_samples
echo "follow all of it: vqscale status $configs"
