// Errors of the core become the classes of the same name in pliant.errors; nothing native escapes.
#include <cerrno>
#include <new>
#include <system_error>

#include "../core/error.h"
#include "bindings.h"

namespace nb = nanobind;

namespace pliant {
namespace {

void raise(const char* name, const char* message) {
    const nb::object type = nb::module_::import_("pliant.errors").attr(name);
    PyErr_SetString(type.ptr(), message);
}

}  // namespace

void init_errors(nb::module_&) {
    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const FormatError& e) {
            raise("FormatError", e.what());
        } catch (const ChecksumError& e) {
            raise("ChecksumError", e.what());
        } catch (const ModelError& e) {
            raise("ModelError", e.what());
        } catch (const EngineError& e) {
            raise("EngineError", e.what());
        } catch (const BudgetError& e) {
            raise("BudgetError", e.what());
        } catch (const UsageError& e) {
            raise("UsageError", e.what());
        } catch (const std::bad_alloc&) {
            raise("BudgetError", "the system has no memory left for this; use a smaller size");
        } catch (const std::system_error& e) {
            errno = e.code().value();
            const nb::object arguments = nb::make_tuple(e.code().value(), e.what());
            PyErr_SetObject(PyExc_OSError, arguments.ptr());
        }
    });
}

}  // namespace pliant
