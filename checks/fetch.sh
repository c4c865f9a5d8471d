#!/bin/sh
# checks/fetch.sh URL SHA256 FILE [BYTES]: downloads FILE, whole and with that digest, or leaves nothing
# behind. What is longer than BYTES is not even downloaded.
set -u
url=$1 sha=$2 file=$3 bytes=${4:-2000000000}
if [ -f "$file" ] && [ "$(sha256sum < "$file" | cut -d' ' -f1)" = "$sha" ]; then
    echo "$file is there already"
    exit 0
fi
mkdir -p "$(dirname "$file")" || exit 1
temporary=$file.part
trap 'rm -f "$temporary"; rmdir "$(dirname "$file")" 2>/dev/null; exit 130' INT TERM
give_up() {
    rm -f "$temporary"
    rmdir "$(dirname "$file")" 2>/dev/null  # only if it is empty
    echo "error: $1" >&2
    exit 1
}
command -v curl > /dev/null || give_up "curl is needed to download $url (Debian: apt-get install curl)"
[ "$bytes" -lt 10000000 ] || [ "$bytes" -ge 2000000000 ] || echo "$file: fetching $bytes bytes"
# Slow is fine, silence is not: less than 1000 bytes a second for a minute ends it.
curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1000 \
    --speed-time 60 --max-filesize "$bytes" --output "$temporary" "$url" ||
    give_up "could not download $url; URL=... names another address"
[ $# -lt 4 ] || [ "$(wc -c < "$temporary")" -eq "$bytes" ] ||
    give_up "$url has $(wc -c < "$temporary") bytes, expected $bytes: nothing was kept"
found=$(sha256sum < "$temporary" | cut -d' ' -f1)
[ "$found" = "$sha" ] || give_up "$url has SHA-256 $found, expected $sha: nothing was kept"
mv "$temporary" "$file" || give_up "could not write $file"
echo "$file: fetched, SHA-256 as expected"
