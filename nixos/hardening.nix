# What the relay is kept from. `systemd-analyze security` gives the unit its score from these lines; what it still finds
# fault with is listed at the end, with the reason.
{ config, lib, ... }:

lib.mkIf config.services.atproto-relay.enable {
  systemd.services.atproto-relay.serviceConfig = {
    # No privilege, and no way to one.
    AmbientCapabilities = "";
    CapabilityBoundingSet = "";
    NoNewPrivileges = true;
    RestrictSUIDSGID = true;
    PrivateUsers = true;
    LockPersonality = true;
    KeyringMode = "private";
    RestrictNamespaces = true;
    RestrictRealtime = true;

    # Files: its own two folders, and read-only what the rest of the system lets everybody read.
    ProtectSystem = "strict";
    ProtectHome = true;
    PrivateTmp = true;
    PrivateMounts = true;
    UMask = "0077";
    RemoveIPC = true;

    # The kernel and its files.
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    PrivateDevices = true;
    DevicePolicy = "closed";

    # System calls. Nothing is compiled at run time, so no page is ever both writable and executable.
    MemoryDenyWriteExecute = true;
    SystemCallArchitectures = "native";
    SystemCallFilter = [
      "@system-service"
      # Raising the soft limit of open files is no part of @resources, but of what every program may do (prlimit64).
      "~@privileged @resources"
    ];
    # An attempt fails as it would for lack of a permission, instead of killing the relay.
    SystemCallErrorNumber = "EPERM";

    # The network. systemd holds the listeners (sockets.nix): the relay binds no port, and nobody inside it can.
    RestrictAddressFamilies = [
      "AF_INET"
      "AF_INET6"
      "AF_UNIX"
    ];
    SocketBindDeny = "any";

    # What remains, with its weight:
    # - PrivateNetwork (0.5), AF_INET and AF_INET6 (0.3), IPAddressDeny (0.2): the relay dials every PDS there is. Which
    #   addresses it may dial it decides itself, after DNS and on each redirect: public ones only. A list here could not
    #   let the machine's resolver through and keep what is beside it out.
    # - DeviceAllow (0.1): ProtectClock= lets the clock's device be read, and PrivateDevices= leaves no such file there.
    # - ProcSubset (0.1): when the process started is reckoned from /proc/stat, and alerts on restarts need to know. Other
    #   users' processes are not seen all the same (ProtectProc=).
    # - AF_UNIX (0.1): PostgreSQL, the journal, systemd and the name service cache are reached through Unix sockets.
    # - RootDirectory (0.1): the program is in the Nix store, so there is no root of its own to be made.
  };
}
