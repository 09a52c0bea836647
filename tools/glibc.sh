#!/usr/bin/env bash
# Makes the folder that has gcc link for glibc 2.28 (`gcc -B FOLDER`), whatever glibc this machine has: the names and
# versions of its functions, and what a program starts with. zig knows these of every glibc.
#
#     tools/glibc.sh ZIG FOLDER
set -euo pipefail
zig=$1 folder=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/glibc"

echo 'int main(void) { return 0; }' > "$work/main.c"
ZIG_GLOBAL_CACHE_DIR=$work/cache ZIG_LOCAL_CACHE_DIR=$work/cache \
	"$zig" cc -target x86_64-linux-gnu.2.28 -o "$work/main" "$work/main.c"
for file in crt1.o libc_nonshared.a libc.so.6 libdl.so.2 libm.so.6 libpthread.so.0 libresolv.so.2 librt.so.1; do
	cp "$(find "$work/cache" -name $file)" "$work/glibc/"
done
for file in libdl.so.2 libm.so.6 libpthread.so.0 librt.so.1; do
	ln -s $file "$work/glibc/${file%.*}"
done
echo 'GROUP ( libc.so.6 libc_nonshared.a )' > "$work/glibc/libc.so"

# Go's package net calls res_search, which is the name since glibc 2.34; before, and after, there is __res_search.
cat > "$work/resolv.c" <<'C'
int __res_search(const char *name, int class, int type, unsigned char *answer, int size);
int res_search(const char *name, int class, int type, unsigned char *answer, int size)
{
	return __res_search(name, class, type, answer, size);
}
C
gcc -O2 -fPIC -c -o "$work/resolv.o" "$work/resolv.c"
ar rc "$work/glibc/libresolv_nonshared.a" "$work/resolv.o"
echo 'GROUP ( libresolv_nonshared.a libresolv.so.2 )' > "$work/glibc/libresolv.so"

rm -rf "$folder"
mv "$work/glibc" "$folder"
