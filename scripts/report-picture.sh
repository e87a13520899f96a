#!/usr/bin/env bash
# Takes the picture of a run's page that README.md shows, in Chromium (make setup-dev).
#   bash scripts/report-picture.sh runs/demo [docs/images/report.png]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:?usage: report-picture.sh RUN [PICTURE]}
picture=${2:-docs/images/report.png}
max_bytes=300000 # README is read on phones, too
page=$(realpath "$run/report/report.html")
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
    echo "report-picture: no Chromium: make setup-dev installs it" >&2
    exit 1
}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$chromium" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-dev-shm-usage \
    --disable-background-networking --user-data-dir="$dir/profile" --force-color-profile=srgb \
    --window-size=1200,1200 --virtual-time-budget=2000 --screenshot="$dir/picture.png" "file://$page" 2>"$dir/log" || {
    cat "$dir/log" >&2
    exit 1
}
size=$(stat -c %s "$dir/picture.png")
if [ "$size" -gt "$max_bytes" ]; then
    echo "report-picture: expected at most $max_bytes bytes, got $size: make the window smaller" >&2
    exit 1
fi
mkdir -p "$(dirname "$picture")"
mv "$dir/picture.png" "$picture"
echo "$picture: $size bytes, from $page"
