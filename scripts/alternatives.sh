#!/bin/sh
# Compare kvlab with programs of others, which are put beside the course's environment, in .venv-alternatives: first the
# contract suite over their stores, then one job through all stores, then DeepSpeed. With a trace, also kvlab's replay
# with NVIDIA Dynamo's, and its routers with SGLang's. Not in CI: it takes ten minutes, and the trace six more.
#
#   sh scripts/alternatives.sh [TRACE]    a file in Mooncake's format (github.com/kvcache-ai/Mooncake, FAST25-release/traces)
set -eu
trace=${1-}
fail() {
    printf 'alternatives: %s\n' "$1" >&2
    exit 1
}
[ -z "$trace" ] || { [ -r "$trace" ] && [ ! -d "$trace" ]; } || fail "$trace is not a file that can be read"
case $trace in '' | /*) ;; *) trace=$PWD/$trace ;; esac

cd "$(dirname "$0")/.."
sh scripts/setup.sh
python=.venv-alternatives/bin/python
if ! said=$(sh scripts/setup.sh --alternatives 2>&1); then
    [ -z "$trace" ] || fail "$said"
    printf 'what pip has was skipped: %s\n' "$said" >&2
    python=.venv/bin/python
fi
$python -m pytest tests/lab/alternatives -q -W ignore::DeprecationWarning
keep() { # NAME COMMAND...: what it prints goes to docs/results/NAME.json, unless it fails
    result=docs/results/$1.json
    shift
    "$@" >"$result.new"
    mv "$result.new" "$result"
}
keep bench_stores $python -m kvlab bench stores --json
[ $python = .venv/bin/python ] || keep deepspeed $python -m kvlab.lab.deepspeed_engine --json
[ -z "$trace" ] || $python scripts/alternatives/run.py "$trace"
