# The kernel's settings for a machine with thousands of long-lived connections, a few of them busy.
{ config, lib, ... }:

let
  cfg = config.services.atproto-relay;
in
{
  options.services.atproto-relay.network.tune = lib.mkOption {
    type = lib.types.bool;
    default = true;
    description = ''
      Whether to tune the kernel's network settings for many long-lived connections. Each setting is a default: a value in
      {option}`boot.kernel.sysctl` takes precedence.
    '';
  };

  config = lib.mkIf (cfg.enable && cfg.network.tune) {
    # BBR paces by the measured bandwidth: a distant consumer on a link with occasional packet loss keeps its rate, while
    # cubic would reduce it at each loss. fq is the queueing discipline that does the pacing.
    boot.kernelModules = [ "tcp_bbr" ];
    boot.kernel.sysctl = lib.mapAttrs (_: lib.mkDefault) {
      "net.ipv4.tcp_congestion_control" = "bbr";
      "net.core.default_qdisc" = "fq";

      # All consumers may reconnect within a second. The queue of established connections (somaxconn) and the buffer sizes
      # are large enough by default.
      "net.ipv4.tcp_max_syn_backlog" = 8192;

      # Unsent data in sockets is kernel memory multiplied by the number of consumers. The relay sends from the log, so a
      # socket needs to buffer no more than this.
      "net.ipv4.tcp_notsent_lowat" = 131072;

      # Without this, the congestion window would shrink to its initial size after each pause of the firehose.
      "net.ipv4.tcp_slow_start_after_idle" = 0;
      # Without this, hosts behind tunnels that drop ICMP messages about packet sizes would stall.
      "net.ipv4.tcp_mtu_probing" = 1;
      # Peers that vanished are detected within five minutes instead of two hours.
      "net.ipv4.tcp_keepalive_time" = 120;
      "net.ipv4.tcp_keepalive_intvl" = 30;
      "net.ipv4.tcp_keepalive_probes" = 6;
    };
  };
}
