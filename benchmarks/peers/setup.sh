#!/usr/bin/env bash
# A virtual environment for each peer, which `benchmarks.run --peers` then starts.
#
#     benchmarks/peers/setup.sh DIR [trl|tunix ...]
#
# makes DIR/peer_trl and DIR/peer_tunix. PYTHON names the interpreter (3.11 or later).
# torch is pinned: a plain `torch` brings the CUDA packages along. For a GPU set
# TORCH and JAX to what its driver wants, for instance TORCH='torch==2.13.0+cu130'
# and JAX='jax[cuda13]'.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
directory=$1
shift
[ $# -gt 0 ] || set -- trl tunix
python=${PYTHON:-python3}
for peer in "$@"; do
    case $peer in
    # The last release of TRL with a PPO trainer.
    trl) packages="${TORCH:-torch==2.13.0} trl==1.12.0 transformers==5.23.0 pandas rich requests" ;;
    tunix) packages="google-tunix==0.1.7 ${JAX:-}" ;;
    *)
        echo "no peer '$peer'; known are trl and tunix" >&2
        exit 2
        ;;
    esac
    "$python" -m venv "$directory/peer_$peer"
    # shellcheck disable=SC2086  # the packages are words
    "$directory/peer_$peer/bin/pip" install -q --disable-pip-version-check $packages
    echo "$directory/peer_$peer is ready"
done
