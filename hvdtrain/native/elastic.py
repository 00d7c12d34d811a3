"""What elastic runs need of Horovod (hvdtrain/elastic): ranks that come, fail and leave in the middle of everything."""

from __future__ import annotations

from hvdtrain.native.mend import Mend


def for_elastic() -> list[Mend]:
    """What elastic runs need (hvdtrain/elastic)."""
    operations, server = "horovod/common/operations.cc", "horovod/runner/http/http_server.py"
    failed = (
        "    } catch (const std::exception& ex) {\n"
        '      LOG(ERROR) << "Horovod could not be initialized: " << ex.what();\n'
        "      state.process_set_table.Finalize(global_gloo_context, SHUT_DOWN_ERROR);\n"
        "      global_gloo_context.Finalize();\n"
        "      state.shut_down = true;\n"
        "      state.initialization_failed = true;\n"
        "      return;\n"
        "    }\n"
    )
    return [
        *for_leaving(),
        # A peer that dies while ranks find each other is an error of hvd.init(), which can be called again, and not
        # the end of all the others' processes.
        Mend(
            operations,
            "    global_gloo_context.Initialize(ParseGlooIface());\n",
            "    try {\n      global_gloo_context.Initialize(ParseGlooIface());\n" + failed,
        ),
        Mend(
            operations,
            "    // Initializes global controller\n"
            "    state.process_set_table.Initialize(global_gloo_context);\n  }\n#endif",
            "    // Initializes global controller\n"
            "    try {\n      state.process_set_table.Initialize(global_gloo_context);\n" + failed + "  }\n#endif",
        ),
        Mend(
            operations,
            "    horovod_global.initialization_done = false;\n    horovod_global.background_thread =\n",
            "    horovod_global.initialization_done = false;\n"
            "    horovod_global.initialization_failed = false;\n"
            "    horovod_global.background_thread =\n",
        ),
        # A process set's contexts are never marked as enabled, and so never closed: ranks that wait for one which has
        # left after an error would hear of it when their time is up.
        Mend(
            "horovod/common/gloo/gloo_context.cc",
            "  if (!enabled_) {\n    return;\n  }\n\n  global_ctx.reset();\n",
            "  global_ctx.reset();\n",
        ),
        # horovodrun's key-value server keeps hvdtrain's keys when it assigns ranks anew, takes the first value only of
        # those that are facts, and lists keys by their beginning.
        Mend(
            server,
            "        with self.cache_lock:\n            self.cache.clear()\n",
            "        with self.cache_lock:\n"
            "            for scope in [scope for scope in self.cache if not scope.startswith('hvdtrain.')]:\n"
            "                del self.cache[scope]\n",
        ),
        Mend(
            server,
            "            scope_dict[key] = value\n",
            "            if scope != 'hvdtrain.facts' or key not in scope_dict:\n"
            "                scope_dict[key] = value\n",
        ),
        Mend(
            server,
            "            return self.server.cache.get(scope, {}).get(key)\n",
            "            values = self.server.cache.get(scope, {})\n"
            "            if scope.startswith('hvdtrain.') and key.endswith('*'):\n"
            "                found = {k: v.decode() for k, v in values.items() if k.startswith(key[:-1])}\n"
            "                return json.dumps(found).encode()\n"
            "            return values.get(key)\n",
        ),
        Mend(server, "import collections\nimport logging\n", "import collections\nimport json\nimport logging\n"),
    ]


def for_leaving() -> list[Mend]:
    """What makes all that is handed over while the background thread ends, as others have left, end with an error.

    As it ends, the thread tells of every tensor that it will not be done, and lets go of it, under the queue's lock;
    to let go of a tensor it needs Python's. Whoever hands over the next one holds Python's lock and waits for the
    queue's: both wait for ever. So Python's lock is given back in all calls. And what comes after the queue has been
    cleared is refused, as nobody will look into it.
    """
    queue, operations = "horovod/common/tensor_queue", "horovod/torch/mpi_ops_v2.cc"
    guard = "  std::lock_guard<std::mutex> guard(mutex_);\n"
    closed = "  if (!closed_.ok()) {\n    return closed_;\n  }\n"
    one, several = "(TensorTableEntry& e, Request& message) {\n", "std::vector<Request>& messages) {\n"
    messages, finalize = "  std::queue<Request> message_queue_;\n", "FinalizeTensorQueue(const Status& status)"
    begun, python = "void Controller::Initialize() {\n", "PYBIND11_MODULE(mpi_lib_v2, "
    return [
        Mend(
            operations,
            python + "m) {\n",
            "namespace {\n"
            "struct Module {\n"
            "  py::module_& module;\n"
            "  template <typename Function> void def(const char* name, Function function) {\n"
            "    module.def(name, function, py::call_guard<py::gil_scoped_release>());\n"
            "  }\n"
            "};\n"
            "} // namespace\n\n" + python + "module) {\n  Module m{module};\n",
        ),
        Mend(operations, "      py::gil_scoped_release release_python_gil;\n", ""),
        Mend(f"{queue}.h", messages, messages + "\n  // Why no more is taken.\n  Status closed_ = Status::OK();\n"),
        Mend(
            f"{queue}.h",
            f"  void {finalize};\n",
            f"  void {finalize};\n\n  void Open() {{\n  {guard}    closed_ = Status::OK();\n  }}\n",
        ),
        Mend(f"{queue}.cc", one + guard, one + guard + closed),
        Mend(f"{queue}.cc", several + guard, several + guard + closed),
        Mend(f"{queue}.cc", f"{finalize} {{\n{guard}", f"{finalize} {{\n{guard}  closed_ = status;\n"),
        Mend("horovod/common/controller.cc", begun, begun + "  tensor_queue_.Open();\n"),
    ]
