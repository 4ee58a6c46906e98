//! One TLS configuration for everything the relay dials, built once and shared.
//! Mozilla's roots come with the binary; roots of the system are trusted as well, so that a private authority works.

use std::error::Error;
use std::io;
use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, RootCertStore};

/// The shared client configuration: TLS 1.2 and 1.3, Mozilla's roots and the system's (or those of `SSL_CERT_FILE`).
pub fn client_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| Arc::new(build())).clone()
}

fn build() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let system = rustls_native_certs::load_native_certs();
    let (added, ignored) = roots.add_parsable_certificates(system.certs);
    tracing::debug!(
        added,
        ignored,
        "loaded the system's certificate authorities"
    );
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// Whether the other side answered a TLS greeting with something else, as a port without TLS does.
pub fn speaks_no_tls(error: &(dyn Error + 'static)) -> bool {
    // An I/O error's source is that of the error in it, not that error.
    let inner = error
        .downcast_ref::<io::Error>()
        .and_then(|error| error.get_ref());
    matches!(error.downcast_ref(), Some(rustls::Error::InvalidMessage(_)))
        || inner.is_some_and(|inner| speaks_no_tls(inner))
        || error.source().is_some_and(speaks_no_tls)
}
