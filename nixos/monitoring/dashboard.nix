# The dashboard, as Grafana reads it. It answers an operator's questions from top to bottom: is it well; does it flow; what
# is refused; which hosts, which consumers; and then what it stands on: log, database, directories, machine.
# A row is a question, a panel an answer; the grid is computed from their order.
{ lib }:

let
  datasource = {
    type = "prometheus";
    uid = "atproto-relay-prometheus";
  };

  # What every query is about: the machine that is chosen at the top.
  relay = ''job="atproto-relay",instance="$instance"'';
  metric = name: "${name}{${relay}}";
  with' = name: labels: "${name}{${relay},${labels}}";
  per = name: "rate(${name}[$__rate_interval])";
  quantile =
    q: histogram:
    "histogram_quantile(${toString q}, sum by (le) (${per (metric "${histogram}_bucket")}))";

  query = legend: expr: { inherit legend expr; };
  targets = lib.imap0 (
    index: query: {
      inherit datasource;
      inherit (query) expr;
      legendFormat = query.legend;
      refId = lib.substring index 1 "ABCDEFGHIJ";
    }
  );

  panel = type: width: height: title: description: unit: queries: more: {
    inherit type title description;
    inherit datasource width height;
    targets = targets queries;
    fieldConfig = {
      defaults = {
        inherit unit;
      }
      // more.defaults or { };
      overrides = [ ];
    };
    options = more.options or { };
  };

  # A line over time.
  graph =
    title: description: unit: queries:
    panel "timeseries" 8 8 title description unit queries {
      defaults = {
        min = 0;
        custom = {
          fillOpacity = 10;
          showPoints = "never";
        };
      };
      options = {
        legend = {
          showLegend = true;
          displayMode = "list";
          placement = "bottom";
          calcs = [ ];
        };
        tooltip = {
          mode = "multi";
          sort = "desc";
        };
      };
    };

  # One number, green while it is well: the steps are where its colour changes.
  number =
    title: description: unit: expr: steps:
    panel "stat" 4 4 title description unit [ (query "" expr) ] {
      defaults.thresholds = {
        mode = "absolute";
        steps = steps;
      };
      options = {
        colorMode = "background";
        graphMode = "area";
        reduceOptions = {
          calcs = [ "lastNotNull" ];
          values = false;
        };
      };
    };
  # What there is now, a row for each series and a column for each of its labels but the hidden ones.
  table =
    width: height: title: description: expr: hidden:
    let
      asGraph = panel "table" width height title description "none" [ (query "" expr) ] {
        options.showHeader = true;
      };
      now = {
        format = "table";
        instant = true;
        range = false;
      };
    in
    asGraph
    // {
      targets = map (target: target // now) asGraph.targets;
      transformations = [
        {
          id = "organize";
          options.excludeByName = lib.genAttrs hidden (_: true);
        }
      ];
    };
  step = color: value: { inherit color value; };
  upTo = yellow: red: [
    (step "green" null)
    (step "yellow" yellow)
    (step "red" red)
  ];
  atLeast = green: [
    (step "red" null)
    (step "green" green)
  ];
  plain = [ (step "blue" null) ];

  rows = [
    {
      title = "Is it well?";
      panels = [
        (number "Relay" "Whether its metrics can be read: 1 is up." "none" (metric "up") (atLeast 1))
        (number "Events a second" "Events that reach the firehose." "short"
          "sum(${per (metric "relay_events_forwarded_total")})"
          (atLeast 0.01)
        )
        (number "Behind the hosts" "Median time from a host's writing an event to its being in the log." "s"
          (metric "relay_lag_seconds")
          (upTo 10 60)
        )
        (number "Hosts connected" "Those that are read more slowly because of a limit included." "short"
          "sum(${with' "relay_hosts" ''state=~"connected|held_back"''})"
          (atLeast 1)
        )
        (number "Consumers" "Connected to the firehose now." "short" (metric "relay_consumers") plain)
        (number "Replay reaches back" "Age of the oldest event in the log." "s"
          (metric "relay_log_oldest_age_seconds")
          plain
        )
        (table 24 5 "Alerts that fire" "None is the usual state of this table."
          ''ALERTS{alertstate="firing",instance=~"$instance|"}''
          [
            "Time"
            "Value"
            "__name__"
            "alertstate"
            "job"
          ]
        )
      ];
    }
    {
      title = "Do events flow?";
      panels = [
        (graph "Events in and out" "Received from hosts, and forwarded to consumers." "eps" [
          (query "received" "sum(${per (metric "relay_events_received_total")})")
          (query "forwarded" "sum(${per (metric "relay_events_forwarded_total")})")
        ])
        (graph "Forwarded, by kind" "Commits are nearly all of it." "eps" [
          (query "{{kind}}" "sum by (kind) (${per (metric "relay_events_forwarded_total")})")
        ])
        (graph "Time through the relay" "From an event's arrival to its being visible to consumers." "s" [
          (query "p50" (quantile 0.5 "relay_time_to_firehose_seconds"))
          (query "p99" (quantile 0.99 "relay_time_to_firehose_seconds"))
        ])
      ];
    }
    {
      title = "What is refused, and why?";
      panels = [
        (graph "Drops by rule" "The log names hosts and accounts: journalctl RELAY_RULE=…" "eps" [
          (query "{{rule}}" "sum by (rule) (${per (metric "relay_events_dropped_total")}) > 0")
        ])
        (graph "Broken chains and gaps"
          "Events forwarded although an account's chain broke; hosts that no longer had what we asked for."
          "short"
          [
            (query "chains an hour" "increase(${metric "relay_events_desynchronized_total"}[1h])")
            (query "gaps an hour" "increase(${metric "relay_upstream_gaps_total"}[1h])")
            (query "cursors from the future an hour" "increase(${metric "relay_upstream_future_cursors_total"}[1h])")
          ]
        )
        (graph "Passed over"
          "Frames of an unknown type, events sent again, relays that called themselves a host."
          "eps"
          [
            (query "unknown" (per (metric "relay_upstream_ignored_total")))
            (query "sent again" (per (metric "relay_upstream_already_durable_total")))
            (query "relays" (per (metric "relay_upstream_relays_refused_total")))
          ]
        )
      ];
    }
    {
      title = "Which hosts are there?";
      panels = [
        (graph "Hosts by state" "Waiting hosts are tried again; offline ones have been tried for long."
          "short"
          [
            (query "{{state}}" "sum by (state) (${metric "relay_hosts"})")
          ]
        )
        (graph "Connections that ended, and limits"
          "A host over its rate is read more slowly; nothing of it is dropped."
          "short"
          [
            (query "ended a minute" "60 * ${per (metric "relay_upstream_disconnects_total")}")
            (query "held back a minute" "60 * ${per (metric "relay_upstream_held_back_total")}")
          ]
        )
        (graph "Memory of hosts' events"
          "own: on their way; shared: borrowed for moments; parked: waiting for a look-up. Waits: sockets that wait for what is shared."
          "short"
          [
            (query "{{part}} bytes" (metric "relay_upstream_memory_bytes"))
            (query "waits a minute" "60 * ${per (metric "relay_upstream_memory_waits_total")}")
          ]
        )
        (graph "Requests for crawls" "New hosts that announce themselves." "short" [
          (query "{{outcome}} an hour" "increase(${metric "relay_crawl_requests_total"}[1h])")
        ])
      ];
    }
    {
      title = "Do consumers keep up?";
      panels = [
        (graph "Consumers" "Refused ones met a limit; slow ones fell out of the window." "short" [
          (query "connected" (metric "relay_consumers"))
          (query "admitted a minute" "60 * ${per (metric "relay_consumers_admitted_total")}")
          (query "refused a minute" "60 * ${per (metric "relay_consumers_refused_total")}")
          (query "too slow an hour" "increase(${metric "relay_consumers_too_slow_total"}[1h])")
          (query "cut for {{reason}} an hour" "increase(${metric "relay_consumers_cut_total"}[1h])")
          (query "held back a minute" "60 * ${per (metric "relay_consumers_held_back_total")}")
          (query "other connections closed for {{reason}} an hour" "increase(${metric "relay_http_connections_closed_total"}[1h])")
        ])
        (graph "Behind the log's end"
          "The slowest and the median consumer. They cost no memory: they read older pages of the log."
          "short"
          [
            (query "{{of}}" (metric "relay_consumer_lag_events"))
          ]
        )
        (graph "Sent" "To all consumers together, WebSocket frames included." "Bps" [
          (query "bytes" (per (metric "relay_consumer_bytes_total")))
        ])
        (graph "Kept over restarts"
          "Consumers taken up from the former process, and those that could not be."
          "short"
          [
            (query "{{outcome}}" (metric "relay_consumers_handed_over_total"))
          ]
        )
        (graph "Events sent" "To all consumers together." "eps" [
          (query "events" (per (metric "relay_consumer_events_total")))
        ])
      ];
    }
    {
      title = "Does the log keep up, and how far back does it reach?";
      panels = [
        (graph "Writes" "One write with its fdatasync; many events share one." "s" [
          (query "p50" (quantile 0.5 "relay_log_write_seconds"))
          (query "p99" (quantile 0.99 "relay_log_write_seconds"))
        ])
        (graph "Window"
          "Age of the oldest event, beside what is set. Below it, the log is short of bytes or of room."
          "s"
          [
            (query "oldest event" (metric "relay_log_oldest_age_seconds"))
            (query "replay_window" (metric "relay_log_window_seconds"))
          ]
        )
        (graph "Size" "The log, what it may take, and what its disk has left." "bytes" [
          (query "log" (metric "relay_log_bytes"))
          (query "log.max_bytes" (metric "relay_log_max_bytes"))
          (query "free on the disk" (metric "relay_log_disk_free_bytes"))
          (query "left free" (metric "relay_log_min_free_bytes"))
          (query "disk" (metric "relay_log_disk_bytes"))
        ])
        (graph "Redactions" "Accounts whose events a deletion or a takedown takes out of the log." "short" [
          (query "pending" (metric "relay_log_redactions_pending"))
          (query "done a minute" "60 * ${per (metric "relay_log_redactions_total")}")
        ])
        (graph "Sequence numbers" "Dense, so the difference is the number of events held." "short" [
          (query "held" "${metric "relay_log_seq"} - ${metric "relay_log_oldest_seq"}")
          (query "not yet durable" (metric "relay_log_durable_lag_events"))
          (query "not yet stored by {{view}}" (metric "relay_view_lag_events"))
        ])
        (graph "Segments removed"
          "By age is as it should be; by bytes or room, the window is shorter than set."
          "short"
          [
            (query "{{reason}} an hour" "increase(${metric "relay_log_segments_removed_total"}[1h])")
          ]
        )
        (graph "Failures" "1 while it takes no events; writes that were repeated." "short" [
          (query "failing" (metric "relay_log_failing"))
          (query "repeated a minute" "60 * ${per (metric "relay_log_write_errors_total")}")
        ])
      ];
    }
    {
      title = "Does the database keep up?";
      panels = [
        (graph "Changes that wait" "At 20,000 the hosts are held back." "short" [
          (query "waiting" (metric "relay_store_queue"))
          (query "failing" (metric "relay_store_failing"))
        ])
        (graph "Batches"
          "Time of one batch; batches that were repeated; public reads that found no free connection."
          "s"
          [
            (query "p50" (quantile 0.5 "relay_store_flush_seconds"))
            (query "p99" (quantile 0.99 "relay_store_flush_seconds"))
            (query "repeated a minute" "60 * ${per (metric "relay_store_flush_errors_total")}")
            (query "public reads refused a minute" "60 * ${per (metric "relay_store_reads_refused_total")}")
          ]
        )
        (graph "Accounts read from the database"
          "Share of the events whose account was not in memory: raise account_cache."
          "percentunit"
          [
            (query "missed" "${per (metric "relay_account_cache_misses_total")} / (${per (metric "relay_account_cache_hits_total")} + ${per (metric "relay_account_cache_misses_total")})")
          ]
        )
      ];
    }
    {
      title = "Do the directories answer?";
      panels = [
        (graph "Look-ups" "Unavailable are the directory's errors; not found and invalid are the accounts'."
          "ops"
          [
            (query "{{method}} {{outcome}}" "sum by (method, outcome) (${per (metric "relay_identity_lookups_total")})")
            (query "status at the PDS" (per (metric "relay_status_lookups_total")))
          ]
        )
        (graph "Time of a look-up" "The directory's own, with the way to it." "s" [
          (query "p50" (quantile 0.5 "relay_identity_lookup_seconds"))
          (query "p99" (quantile 0.99 "relay_identity_lookup_seconds"))
        ])
        (graph "Events that wait for an identity" "And the identities that are in memory." "short" [
          (query "parked" "sum(${metric "relay_shard_parked"})")
          (query "in memory" (metric "relay_identity_cache_entries"))
        ])
        (graph "Look-ups that wait for a turn" "The hosts whose events ask share the places." "short" [
          (query "{{kind}}" (metric "relay_lookups_waiting"))
        ])
        (graph "Identities found in memory" "Share of the questions." "percentunit" [
          (query "found" "${per (metric "relay_identity_cache_hits_total")} / (${per (metric "relay_identity_cache_hits_total")} + ${per (metric "relay_identity_cache_misses_total")})")
        ])
      ];
    }
    {
      title = "What does it cost the machine?";
      panels = [
        (graph "Processor" "Cores that the relay keeps busy; a shard is one thread." "short" [
          (query "cores" (per (metric "process_cpu_seconds_total")))
        ])
        (graph "Queues of the shards"
          "Long ones on all shards: the processor is short. On one: a single account."
          "short"
          [
            (query "shard {{shard}}" (metric "relay_shard_queue"))
          ]
        )
        (graph "Memory" "Of the process; the page cache of the log is the kernel's." "bytes" [
          (query "resident" (metric "process_resident_memory_bytes"))
        ])
        (graph "Accounts in memory" "By shard; under pressure the caches shrink." "short" [
          (query "shard {{shard}}" (metric "relay_shard_residents"))
          (query "times shrunk" (metric "relay_memory_pressure_total"))
        ])
        (graph "Open files" "A consumer and a host are one each." "short" [
          (query "open" (metric "process_open_fds"))
          (query "most" (metric "process_max_fds"))
        ])
        (graph "Restarts and reloads"
          "Within an hour; parts that show no progress; problems of /_health; settings that wait for a restart."
          "short"
          [
            (query "restarts" "changes(${metric "process_start_time_seconds"}[1h])")
            (query "reloads {{outcome}}" "increase(${metric "relay_config_reloads_total"}[1h])")
            (query "last reload refused" (metric "relay_config_reload_failed"))
            (query "wait for a restart" (metric "relay_config_restart_needed"))
            (query "stuck: {{part}}" (metric "relay_watchdog_stuck"))
            (query "problem: {{name}}" (metric "relay_problem"))
          ]
        )
        (graph "Start" "Steps of recovery at the last start, and the version that runs." "short" [
          (query "steps of recovery" (metric "relay_recovery_steps_total"))
          (query "version {{version}}" (metric "relay_build_info"))
        ])
        (graph "Disks" "Time that requests took, by device." "s" [
          (query "write {{device}}" ''rate(node_disk_write_time_seconds_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval]) / rate(node_disk_writes_completed_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval])'')
          (query "read {{device}}" ''rate(node_disk_read_time_seconds_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval]) / rate(node_disk_reads_completed_total{job="atproto-relay-node",instance="$instance"}[$__rate_interval])'')
        ])
        (graph "Network" "All of the machine." "Bps" [
          (query "out {{device}}" ''rate(node_network_transmit_bytes_total{job="atproto-relay-node",instance="$instance",device!="lo"}[$__rate_interval])'')
          (query "in {{device}}" ''rate(node_network_receive_bytes_total{job="atproto-relay-node",instance="$instance",device!="lo"}[$__rate_interval])'')
        ])
      ];
    }
  ];

  # Panels from left to right, and a new line where one does not fit; a row heading is one line high.
  columns = 24;
  place =
    state: panel:
    let
      fits = state.x + panel.width <= columns;
      x = if fits then state.x else 0;
      y = if fits then state.y else state.y + state.tallest;
      placed =
        removeAttrs panel [
          "width"
          "height"
        ]
        // {
          inherit (state) id;
          gridPos = {
            inherit x y;
            w = panel.width;
            h = panel.height;
          };
        };
    in
    {
      id = state.id + 1;
      x = x + panel.width;
      inherit y;
      tallest = if fits then lib.max state.tallest panel.height else panel.height;
      panels = state.panels ++ [ placed ];
    };
  placeRow =
    state: row:
    let
      y = state.y + state.tallest;
      heading = {
        type = "row";
        inherit (row) title;
        inherit (state) id;
        collapsed = false;
        panels = [ ];
        gridPos = {
          x = 0;
          inherit y;
          w = columns;
          h = 1;
        };
      };
    in
    lib.foldl' place {
      id = state.id + 1;
      x = 0;
      y = y + 1;
      tallest = 0;
      panels = state.panels ++ [ heading ];
    } row.panels;
  placed = lib.foldl' placeRow {
    id = 1;
    x = 0;
    y = 0;
    tallest = 0;
    panels = [ ];
  } rows;
in
{
  uid = "atproto-relay";
  title = "AT Protocol relay";
  tags = [ "atproto" ];
  timezone = "utc";
  editable = false;
  refresh = "30s";
  schemaVersion = 39;
  version = 1;
  time = {
    from = "now-6h";
    to = "now";
  };
  templating.list = [
    {
      name = "instance";
      label = "Machine";
      type = "query";
      inherit datasource;
      query = ''label_values(up{job="atproto-relay"}, instance)'';
      refresh = 1;
      sort = 1;
    }
  ];
  inherit (placed) panels;
}
