# A checking client: writes 1, 2, 3, … below a path, each number together with a step in one
# transaction, reads back what it has written, and watches the steps.
#   sh counter.sh BASE DIR       runs until BASE/go is 0
# DIR/steps has a word for each number, when:number with the time in centiseconds, or error:…;
# DIR/events has the events of the watch; DIR/done exists at the end.
. /lib/xen-vm/checks.sh
base=$1 dir=$2
mkdir -p "$dir"
say() { { printf %s "$*" | tr ' \n' _ && echo; } >>steps; }
cd "$dir" || exit 1
xenstore-write "$base/go" 1 "$base/step" 0 || say "error: start"
xenstore-watch "$base/step" >events 2>watch-errors &
watch=$!
wait_for 30 test -s events || say "error: no first event"
i=0 go=1
while [ $go = 1 ]; do
	i=$((i + 1))
	step=$base/step/$((i % 64))
	error=$(xenstore-write "$base/seq" $i "$step" $i 2>&1) || say "error: writing $i: $error"
	# In the order of the words: go, number, step.
	# shellcheck disable=SC2046
	set -- $(xenstore-read "$base/go" "$base/seq" "$step" 2>&1)
	[ "$*" = "$go $i $i" ] || [ "$*" = "0 $i $i" ] || say "error: read back for $i: $*"
	[ "$1" != 0 ] || go=0
	read -r up _ </proc/uptime
	echo "${up%.*}${up#*.}:$i" >>steps
done
last() { [ "$(tail -n 1 events)" = "$step" ]; }
wait_for 60 last || say "error: the last event is missing"
kill $watch || say "error: the watch has ended"
[ ! -s watch-errors ] || say "error: $(cat watch-errors)"
touch done
