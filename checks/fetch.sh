#!/bin/sh
# checks/fetch.sh URL SHA256 FILE: downloads FILE, whole and with that digest, or leaves nothing behind.
set -u
url=$1 sha=$2 file=$3
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
curl --fail --silent --show-error --location --max-time 600 --output "$temporary" "$url" ||
    give_up "could not download $url; URL=... names another address"
found=$(sha256sum < "$temporary" | cut -d' ' -f1)
[ "$found" = "$sha" ] || give_up "$url has SHA-256 $found, expected $sha: nothing was kept"
mv "$temporary" "$file" || give_up "could not write $file"
echo "$file: fetched, SHA-256 as expected"
