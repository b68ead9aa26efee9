# file, sed expr
cd /work/wt-kernels
f=$1; cp $f /tmp/ob/orig; sed -i "$2" $f
if cmp -s $f /tmp/ob/orig; then echo "NO CHANGE: $2"; exit; fi
/work/main/.venv/bin/cmake --build /tmp/ob/tb --target tulle_test_search 2>&1 | grep -E "error"
echo "== $2"; OMP_WAIT_POLICY=passive timeout 60 /tmp/ob/tb/tulle_test_search | cut -d, -f1 | sort | uniq -c | sort -rn | head -3
cp /tmp/ob/orig $f
