#!/bin/sh
# Make the course's environment in .venv; do nothing if the environment is up to date.
#
#   sh scripts/setup.sh              make the environment
#   sh scripts/setup.sh --engines    make another one with vLLM, in .venv-engines (Linux, about 3 GB)
#   sh scripts/setup.sh --ray        put Ray beside .venv, in .venv-ray (about 400 MB)
#   sh scripts/setup.sh --alternatives   put the programs of others beside .venv, in .venv-alternatives (about 900 MB)
#   sh scripts/setup.sh --copy DIR   copy the notebooks to DIR; existing files do not change
#
# PYTHON             Python to use; default: the first usable one of python3.13, 3.12, 3.11, python3
# KVLAB_TORCH_INDEX  index with CPU builds of PyTorch; empty: only the indexes of the pip settings
set -eu
cd "$(dirname "$0")/.."

venv=.venv lock=requirements.lock no_deps=
if [ "${1-}" = --engines ]; then
    # vLLM's own requirements would replace torch and add gigabytes, so its lock file is all that is installed
    venv=.venv-engines lock=requirements-engines.lock no_deps=--no-deps
    PYTHON=${PYTHON:-python3.11} # the lock file is for this version
fi
case ${1-} in --ray | --alternatives) venv=.venv${1#-} lock=requirements${1#-}.lock ;; esac
[ $venv != .venv-alternatives ] || lock="$lock requirements-ray.lock" # Ray's object store is one of them
log=$venv/setup.log # of the last pip command
torch_index=${KVLAB_TORCH_INDEX-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$1"; }
fail() {
    printf 'kvlab set-up: %s\n' "$1" >&2
    exit 1
}

# --- is the environment up to date ------------------------------------------------------------
# The state contains a checksum, because a checkout changes dates, and the folder, because environments cannot be moved.
state() {
    cat $lock pyproject.toml scripts/setup.sh | cksum
    pwd -P
}

up_to_date() {
    [ "$(cat $venv/.ready 2>/dev/null)" = "$(state)" ] && $venv/bin/python -c '' 2>/dev/null
}

# --- Python -----------------------------------------------------------------------------------
# Each candidate is run, because a name on the PATH may be only the shim of a version manager.
# PyTorch has no build for 3.15 yet. Debian and Ubuntu have venv and ensurepip in a separate package.
usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }
makes_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    without_venv=
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3
    fi
    for python in "$@"; do
        usable "$python" || continue
        makes_venvs "$python" && return
        without_venv=${without_venv:-$python}
    done
    if [ -n "$without_venv" ]; then
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$without_venv cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python$version-venv"
    elif [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a working Python 3.11 to 3.14; set PYTHON to another one, or unset it to search for one"
    fi
    fail "no Python 3.11 to 3.14 found; install one (sudo apt-get install python3 python3-venv, or brew install python@3.13) or give its path: make lab PYTHON=/path/to/python3"
}

# A working environment is kept. A moved or copied environment would install packages in another folder.
has_environment() {
    usable $venv/bin/python || return 1
    case $($venv/bin/pip --version 2>/dev/null) in
        *" from $(pwd -P)/$venv/"*) ;;
        *) return 1 ;;
    esac
}

# --- pip --------------------------------------------------------------------------------------
# PIP_USER=0, because --user installs outside the environment. All other pip settings apply.
pip() { PIP_USER=0 $venv/bin/python -m pip --disable-pip-version-check --no-input "$@" >"$log" 2>&1; }

explain_pip() {
    if grep -q 'No space left on device' "$log"; then
        fail "the disk is full; free about 3 GB (or point TMPDIR at a larger disk) and run the same command again"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded|SSLError|Connection (broken|reset|refused)' "$log"; then
        fail "the package index cannot be reached; check the network and proxy (PIP_INDEX_URL selects another index) and run the same command again; details: $log"
    fi
    fail "pip failed: $(grep -i '^error' "$log" | tail -n 1); details: $log"
}

needs_space() { # in GB
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000000) }')
    [ "${free:-$1}" -ge "$1" ] || fail "needs about $1 GB of disk, and only $free GB are free here; free some and run the same command again"
}

# --- PyTorch ----------------------------------------------------------------------------------
# On Linux, the default build cannot be imported without several GB of CUDA libraries. Without an NVIDIA GPU,
# this function therefore requests the CPU build by its full version, from pip's indexes and from PyTorch's
# index. The short timeout limits the delay by a blocked index to seconds. --no-deps: no other package comes
# from PyTorch's index. If no CPU build is available, the default build is installed, after a message about
# its size. On macOS the default build is the CPU build.
install_torch() {
    torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $lock)
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        pip install --no-deps --timeout 15 --retries 1 ${torch_index:+--extra-index-url "$torch_index"} "$torch+cpu" && return
        pip install --dry-run "$torch" || explain_pip
        if grep -q 'Would install.* nvidia-' "$log"; then
            needs_space 10
            say "      no CPU build is available (tried ${torch_index:-the settings of pip}): installing the default build, with about 3 GB of CUDA libraries that this machine does not use"
        fi
    fi
    pip install "$torch" || explain_pip
}

# --- commands ---------------------------------------------------------------------------------
set_up() {
    up_to_date && return
    [ -w . ] || fail "$(pwd -P) cannot be written to; copy the project to a folder of your own and run the command there"
    rm -f $venv/.ready # an interrupted set-up starts again
    if has_environment; then
        say "[1/3] $venv exists"
    else
        needs_space 3
        find_python
        say "[1/3] making $venv with $("$python" --version)"
        "$python" -m venv --clear $venv || fail "cannot make $venv in $(pwd -P); the reason is above"
    fi
    say "[2/3] installing PyTorch (about 200 MB; minutes on a slow connection)"
    install_torch
    say "[3/3] installing the other packages of $lock"
    pip install $no_deps -r $lock || explain_pip
    # compat: a path entry. With the default finder, Python would import a folder kvlab in the current directory.
    pip install --no-deps --no-build-isolation --config-settings editable_mode=compat -e . || explain_pip
    state >$venv/.ready
    say "ready: $venv"
}

# It has only what .venv lacks, and finds the rest there: PyTorch once more would be 900 MB.
set_up_beside() {
    up_to_date && return
    usable .venv/bin/python || fail "there is no .venv yet; make it first: make setup"
    needs_space 2
    rm -f $venv/.ready
    say "[1/2] making $venv beside .venv"
    .venv/bin/python -m venv --clear --without-pip $venv || fail "cannot make $venv in $(pwd -P); the reason is above"
    where='import sysconfig; print(sysconfig.get_path("purelib"))'
    # addsitedir, because kvlab itself is a path entry in there
    printf 'import site; site.addsitedir("%s")\n' "$(.venv/bin/python -c "$where")" >"$($venv/bin/python -c "$where")/beside.pth"
    say "[2/2] installing the packages of $lock"
    PIP_USER=0 .venv/bin/python -m pip --python $venv --disable-pip-version-check --no-input \
        install --no-deps $(printf -- '-r %s ' $lock) >"$log" 2>&1 || explain_pip
    state >$venv/.ready
    say "ready: $venv"
}

copy_notebooks() {
    mkdir -p "$1"
    new=0 kept=0
    for notebook in notebooks/*.ipynb; do
        if [ ! -e "$notebook" ]; then
            continue # no notebooks: the shell has not expanded the pattern
        elif [ -e "$1/${notebook##*/}" ]; then
            kept=$((kept + 1))
        else
            cp "$notebook" "$1/"
            new=$((new + 1))
        fi
    done
    say "$1: $new notebooks copied, $kept existing ones not changed"
}

case ${1-} in
    '' | --engines) set_up ;;
    --ray | --alternatives) set_up_beside ;;
    --copy) copy_notebooks "${2:?usage: setup.sh --copy DIR}" ;;
    *) fail "unknown option $1; the first lines of scripts/setup.sh list the options" ;;
esac
