#!/usr/bin/env bash
# Builds census-tf-control and census-tf-worker with buildah, which needs no engine, so it works in a container too.
# With Docker:  docker build --platform linux/amd64 --target control -t census-tf-control .    (and worker)
#
#   deploy/images/build.sh [TAG] [--build-arg=NAME=VALUE ...]      the top of the Dockerfile lists the arguments
#
#   BASE=debootstrap   makes the base from Debian's packages instead of pulling an image
#
# The build uses the settings of `pip config` on this machine (registry, certificate, folders of wheels). They are
# mounted, so no layer, history or environment of an image contains them.
set -euo pipefail
cd "$(dirname "$0")/../.."
tag=latest
if [[ $# -gt 0 && $1 != -* ]]; then
    tag=$1
    shift
fi
base=${BASE:-debian:bookworm-slim}
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT

if [[ $base == debootstrap ]]; then
    base=localhost/census-tf-base:bookworm
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        debootstrap --arch=amd64 --variant=minbase bookworm "$work/rootfs"
        # Debian's slim images leave these out too.
        rm -rf "$work"/rootfs/var/{lib/apt/lists,cache/apt/archives}/* "$work"/rootfs/usr/share/{doc,man,locale}/*
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$work/rootfs" /
        buildah config --arch amd64 --cmd bash "$container"
        buildah commit --quiet --rm "$container" "$base"
    fi
fi

mkdir "$work/pip"
python3 deploy/images/pip_settings.py "$work/pip" >"$work/mounts"
mapfile -t mounts <"$work/mounts"
for target in control worker; do
    buildah build --platform linux/amd64 --layers --isolation chroot --format docker --build-arg "BASE=$base" "$@" \
        --secret "id=pip.conf,src=$work/pip/pip.conf" "${mounts[@]}" \
        --target "$target" --tag "localhost/census-tf-$target:$tag" .
done
