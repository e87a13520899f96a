#!/usr/bin/env bash
# Installs the Debian packages that some tests use; where they are missing those tests say so and are skipped.
#   chromium   opens report.html in a real browser
#   strace     injects failing system calls
set -euo pipefail
packages=(chromium strace)
command -v apt-get >/dev/null || {
    echo "setup-dev: apt-get is missing: install ${packages[*]} by your system's own means" >&2
    exit 1
}
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
"${as_root[@]}" apt-get update
"${as_root[@]}" apt-get install --yes --no-install-recommends "${packages[@]}"
