#!/bin/bash
# What translate.cpp must refuse, with file and line; and that it keeps line numbers.
# usage: test_translate.sh build/translate
set -u
translate=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

# refuses "text with \n" "line" "part of the message"
refuses() {
    printf "$1" > "$folder/a.cu"
    message=$("$translate" "$folder/a.cu" "$folder/a.cpp" 2>&1)
    status=$?
    case "$status $message" in
        1\ "$folder/a.cu:$2: translate: "*"$3"*) ;;
        *) echo "FAILED on: $1"; echo "  found: exit $status, $message"; failed=1 ;;
    esac
}
refuses 'int a;\nvoid f() { k<<<1>>>(a); }\n' 2 'cannot read the launch'
refuses 'void f() { k<<<1, 2, 3, 4, 5>>>(a); }\n' 1 'cannot read the launch'
refuses 'void f() { k<<<1, 2; }\n' 1 '<<< without >>>'
refuses '\n\nvoid f() { k<<<1, 2>>>; }\n' 3 'arguments must follow'
refuses 'void f() { (k)<<<1, 2>>>(); }\n' 1 'no kernel name'
refuses '__global__ void k() { asm("exit;"); }\n' 1 'inline assembly'
refuses '// PTX wrappers begin\nasm("x");\n' 1 'no line "// PTX wrappers end"'
refuses '__global__ void k() { __shared__ int a = 3; }\n' 1 'initial value'
refuses '__global__ void k() { extern __shared__ int a; }\n' 1 'extern __shared__ T name[]'
refuses '\n__managed__ int x;\n' 2 'managed memory'
refuses '__global__;\n' 1 'no function follows'

# accepts "text" "a line that the output must hold" "its number"
accepts() {
    printf "$1" > "$folder/a.cu"
    if ! "$translate" "$folder/a.cu" "$folder/a.cpp" 2> "$folder/errors"; then
        echo "FAILED on: $1"; cat "$folder/errors"; failed=1; return
    fi
    found=$(sed '1,/^#line 1 /d' "$folder/a.cpp" | sed -n "$3p")
    [[ "$found" == *"$2"* ]] || { echo "FAILED on: $1"; echo "  line $3: $found"; failed=1; }
}
accepts '// k<<<1>>>\nconst char* s = "<<<";\nint x;\n' 'int x;' 3
accepts 'void f() {\n  k<a, 3><<<dim3(1, 2),\n  4>>>(x);\n}\nint y;\n' 'int y;' 5
accepts 'void f() { kernel<<<1, 2>>>(x); }\n' 'launch(name, ' 1
accepts 'void f() { n::k<<<1, 2>>>(x); }\n' 'launch("n::k", ' 1
accepts '// GPU only begin\nasm("x");\n// GPU only end\nint z;\n' 'int z;' 4
accepts '#pragma unroll 4\nint w = 1'"'"'000;\n' 'int w' 2
accepts 'namespace n { __global__ void __launch_bounds__(64, 2)\nk(int a) {\nint b; } }\n' 'check_launch_bounds(64)' 2
grep -q '"k", ' "$folder/a.cpp" || { echo "FAILED: the list of kernels"; failed=1; }
printf '#include "b.cu"\nint last;\n' > "$folder/c.cu"
printf 'int first;\n__global__ void inner() {}\n' > "$folder/b.cu"
"$translate" "$folder/c.cu" "$folder/c.cpp" && grep -q 'int first;' "$folder/c.cpp" &&
    grep -q '"inner", ' "$folder/c.cpp" || { echo "FAILED: an included .cu file"; failed=1; }

[ $failed = 0 ] && echo "translate: all as expected"
exit $failed
