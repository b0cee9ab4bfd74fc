//! Features and quotas, global and of domains.

use xenstore_protocol::{DomId, Errno, Features, Quota, Reply};

use crate::domain::host::Host;
use crate::engine::Engine;
use crate::ids::ConnId;

impl Engine {
    pub(crate) fn get_feature(
        &mut self,
        conn: ConnId,
        domid: Option<DomId>,
        host: &mut dyn Host,
    ) -> Result<Reply<'static>, Errno> {
        let Some(domid) = domid else { return Ok(Reply::Features(self.features(conn))) };
        if !self.rights(conn).privileged {
            return Err(Errno::Eacces);
        }
        let domain = self.domains.find(domid, host).ok_or(Errno::Enoent)?;
        Ok(Reply::Features(domain.features))
    }

    /// Features cannot change once a guest may have seen them.
    pub(crate) fn set_feature(
        &mut self,
        domid: DomId,
        features: Features,
        host: &mut dyn Host,
    ) -> Result<(), Errno> {
        let domain = self.domains.find(domid, host).ok_or(Errno::Enoent)?;
        if domain.introduced {
            return Err(Errno::Ebusy);
        }
        if !Features::ALL.contains(features) {
            return Err(Errno::Einval);
        }
        domain.features = features;
        Ok(())
    }

    pub(crate) fn get_quota(
        &mut self,
        domid: Option<DomId>,
        quota: Option<Quota>,
        host: &mut dyn Host,
    ) -> Result<Reply<'static>, Errno> {
        let Some(quota) = quota else { return Ok(Reply::all_quota_names()) };
        let default = self.domains.defaults.get(quota);
        let Some(domid) = domid else { return Ok(Reply::Number(default)) };
        let own = self.domains.find(domid, host).ok_or(Errno::Enoent)?.quotas.get(quota);
        // The control domain has no limits, and answers as with C xenstored what others start with.
        let is_unset = own == 0 && domid == self.config.privileged;
        Ok(Reply::Number(if is_unset { default } else { own }))
    }

    /// A new global value is what domains start with that appear later.
    pub(crate) fn set_quota(
        &mut self,
        domid: Option<DomId>,
        quota: Quota,
        value: u32,
        host: &mut dyn Host,
    ) -> Result<(), Errno> {
        let quotas = match domid {
            None => &mut self.domains.defaults,
            Some(domid) => &mut self.domains.find(domid, host).ok_or(Errno::Enoent)?.quotas,
        };
        quotas.set(quota, value);
        self.epoch += 1;
        Ok(())
    }
}
