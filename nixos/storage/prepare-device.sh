# Creates a file system on an empty device. Arguments: device, type, label. A device that already has this file system is
# left unchanged. A device with any other content is refused with a one-line message.
set -eu

# Bytes at the start and at the end of a device that must be zeros if it counts as empty: partition tables, headers and
# their copies are within this range.
PROBED_BYTES=8388608

device=$1
type=$2
label=$3

refuse() {
    echo "$device $1; it is left unchanged" >&2
    exit 1
}

# Prints the value that blkid finds for a tag, or nothing.
found() {
    blkid --probe --output value --match-tag "$1" "$device" || true
}

zeros() {
    cmp --silent --bytes="$PROBED_BYTES" --ignore-initial="$1:0" "$device" /dev/zero
}

[ -e "$device" ] || refuse 'does not exist'
[ -r "$device" ] && [ -w "$device" ] || refuse 'cannot be read and written'

# blkid returns 0 for one signature, 2 for none, and 8 for several that contradict each other.
status=0
blkid --probe "$device" >/dev/null || status=$?
case $status in
    0)
        if [ "$(found TYPE)" = "$type" ] && [ "$(found LABEL)" = "$label" ]; then
            echo "$device already has the file system \"$label\""
            exit 0
        fi
        refuse "has other content than the $type \"$label\": $(found TYPE) $(found PTTYPE) \"$(found LABEL)\""
        ;;
    2) ;;
    *) refuse "is not certainly empty (blkid: $status)" ;;
esac

# wipefs knows signatures that blkid does not report.
signatures=$(wipefs --no-act --noheadings --output TYPE "$device")
[ -z "$signatures" ] || refuse "has a signature: $signatures"

# Data without a signature, for example an encrypted container or a raw dump. A new or discarded drive reads as zeros.
size=$(blockdev --getsize64 "$device" 2>/dev/null || stat --dereference --format %s "$device")
[ "$size" -ge $((4 * PROBED_BYTES)) ] || refuse "is too small ($size bytes)"
zeros 0 && zeros $((size - PROBED_BYTES)) ||
    refuse 'has no signature, but has data on it (blkdiscard empties a drive)'

# Without -f and -F, so that mkfs refuses to overwrite data that appeared since the check.
case $type in
    xfs) mkfs.xfs -q -L "$label" "$device" ;;
    # No reserved blocks: they are meant for system disks, and the relay leaves free space itself.
    ext4) mkfs.ext4 -q -m 0 -L "$label" "$device" ;;
    *) refuse "cannot get a file system \"$type\"" ;;
esac
echo "$device has a new file system \"$label\""
