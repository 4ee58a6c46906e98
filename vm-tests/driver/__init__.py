"""The runner of vm-tests on Debian guests: NixOS' test language over systemd-nspawn and qemu."""
