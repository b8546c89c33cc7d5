#!/usr/bin/env bash
# Install the object stores that the tests start: tests/servers/install.sh FOLDER
# For Debian 12, as root. FOLDER, outside the checkout, is given what npm brings; put
# FOLDER/node_modules/.bin on PATH afterwards. (Two more come with pip's extra `test`.)
set -euo pipefail
folder=${1:?a folder for what npm installs}

export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends \
    radosgw ceph-mon ceph-osd ceph-common openssl \
    swift-proxy swift-account swift-container swift-object memcached
command -v npm >/dev/null || apt-get install -q -y --no-install-recommends nodejs npm
mkdir -p "$folder"
npm install --prefix "$folder" --no-audit --no-fund azurite@3.35.0
