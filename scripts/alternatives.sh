#!/bin/sh
# Compare kvlab's replay of a trace with NVIDIA Dynamo's, and its routers with SGLang's, which are put beside the
# course's environment, in .venv-alternatives. Not a test: it takes six minutes, and the trace is not in the project.
#
#   sh scripts/alternatives.sh TRACE    a file in Mooncake's format
set -eu
trace=${1-}
fail() {
    printf 'alternatives: %s\n' "$1" >&2
    exit 1
}
[ -n "$trace" ] || fail "no trace given; make alternatives TRACE=conversation_trace.jsonl (github.com/kvcache-ai/Mooncake, FAST25-release/traces)"
[ -r "$trace" ] && [ ! -d "$trace" ] || fail "$trace is not a file that can be read"

case $trace in /*) ;; *) trace=$PWD/$trace ;; esac

cd "$(dirname "$0")/.."
sh scripts/setup.sh
sh scripts/setup.sh --alternatives
exec .venv-alternatives/bin/python scripts/alternatives/run.py "$trace"
