# Runs in the demo's guest. Lines "name: value" are read by the demo; the rest is for whoever watches.
interface_of() { # the network interface whose driver is $1
  for i in /sys/class/net/*; do
    [ "$(basename "$(readlink "$i/device/driver")")" = "$1" ] && basename "$i" && return
  done
}
interrupts_of() { # all MSI-X interrupts so far whose line in /proc/interrupts matches $1
  grep MSI /proc/interrupts | grep "$1" | awk '{ for (n = 2; n <= NF && $n ~ /^[0-9]+$/; n++) sum += $n } END { print sum + 0 }'
}
waited_for() { # $1 exists, within 10 s
  n=0; while [ ! -e "$1" ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done; [ -e "$1" ]
}

echo "kernel: $(uname -sr), $(nproc) vCPUs, $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB"
echo "functions: $(ls /sys/bus/pci/devices | wc -l) on the PCI bus"

# Assigned: the NVMe drive
if ls -d /sys/bus/pci/drivers/nvme/0* >/dev/null 2>&1 && waited_for /dev/nvme0n1; then
  echo "drive-digest: $(dd if=/dev/nvme0n1 bs=1M count=16 2>/dev/null | sha256sum | cut -d' ' -f1)"
  echo "drive-interrupts: $(interrupts_of nvme0q)"
fi

# Assigned: the network card
card=$(interface_of e1000e)
if [ -n "$card" ]; then
  ip addr add 10.0.2.15/24 dev "$card"; ip link set "$card" up
  waited_for /sys/class/net/$card/carrier; n=0
  while [ "$(cat /sys/class/net/$card/carrier)" != 1 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
  before=$(interrupts_of "$card")
  if ping -c 3 -W 5 -I "$card" 10.0.2.2; then echo "card-ping: answered"; else echo "card-ping: no answer"; fi
  echo "card-interrupts: $before before, $(interrupts_of "$card") after"
fi

# Emulated
[ -b /dev/vda ] && echo "disk-digest: $(sha256sum /dev/vda | cut -d' ' -f1)"
tap=$(interface_of virtio_net)
if [ -n "$tap" ]; then
  ip addr add 192.0.2.2/24 dev "$tap"; ip link set "$tap" up
  if ping -c 3 -W 5 -I "$tap" 192.0.2.1; then echo "tap-ping: answered"; else echo "tap-ping: no answer"; fi
fi
case $(cat /sys/class/misc/hw_random/rng_current) in
  virtio_rng*) echo "entropy: $(head -c 16 /dev/hwrng | hexdump -v -e '1/1 "%02x"')" ;;
esac
