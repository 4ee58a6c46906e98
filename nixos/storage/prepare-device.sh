# Makes a file system on a device that is empty, and on no other. Called with the device, the type and the label.
# A device that has that very file system is left as it is; one that has anything else is refused, in one line.
set -eu

# What must read as zeros at the beginning and at the end of a device that counts as empty: tables of partitions,
# headers and their copies are all within it.
PROBED_BYTES=8388608

device=$1
type=$2
label=$3

refuse() {
    echo "$device $1; it is left as it is" >&2
    exit 1
}

# Prints what is found under a name, or nothing.
found() {
    blkid --probe --output value --match-tag "$1" "$device" || true
}

zeros() {
    cmp --silent --bytes="$PROBED_BYTES" --ignore-initial="$1:0" "$device" /dev/zero
}

[ -e "$device" ] || refuse 'is not there'
[ -r "$device" ] && [ -w "$device" ] || refuse 'may not be read and written'

# blkid says 0 for one thing found, 2 for nothing, and 8 for two that contradict each other.
status=0
blkid --probe "$device" >/dev/null || status=$?
case $status in
    0)
        if [ "$(found TYPE)" = "$type" ] && [ "$(found LABEL)" = "$label" ]; then
            echo "$device has the file system \"$label\""
            exit 0
        fi
        refuse "has something else than the $type \"$label\": $(found TYPE) $(found PTTYPE) \"$(found LABEL)\""
        ;;
    2) ;;
    *) refuse "cannot be told to be empty (blkid: $status)" ;;
esac

# What blkid does not name, wipefs may.
signatures=$(wipefs --no-act --noheadings --output TYPE "$device")
[ -z "$signatures" ] || refuse "bears a signature: $signatures"

# Data without a signature: a key file's container, a raw dump. A new or discarded drive reads as zeros.
size=$(blockdev --getsize64 "$device" 2>/dev/null || stat --dereference --format %s "$device")
[ "$size" -ge $((4 * PROBED_BYTES)) ] || refuse "is too small ($size bytes)"
zeros 0 && zeros $((size - PROBED_BYTES)) ||
    refuse 'bears no signature, but has data on it (blkdiscard empties a drive that is to be used)'

# Without -f and -F, which would write over what is there, should something have come there since.
case $type in
    xfs) mkfs.xfs -q -L "$label" "$device" ;;
    # Five per cent for root are for systems; the relay leaves room by itself.
    ext4) mkfs.ext4 -q -m 0 -L "$label" "$device" ;;
    *) refuse "cannot be given a file system \"$type\"" ;;
esac
echo "$device has a new file system \"$label\""
